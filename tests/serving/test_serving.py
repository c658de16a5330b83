"""The example model behind Ray Serve: real replicas, real HTTP, the official client."""

import contextlib
import json
import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from examples.application import ROOT
from examples.tiny_moe.data import MODEL, MODEL_ID, example_texts
from sere_dist.admin import ACTIVITY_PATH, AdminError, request_settings, request_trial
from sere_dist.environment import ADMIN_TOKEN
from serve_apps.settings import FEWEST_REQUESTS
from tests.soak.load import REPLICA, processes
from tests.support import engines
from tests.support.metrics import metrics
from tests.support.polling import PATIENCE, eventually

NEW = 24
pytestmark = pytest.mark.parametrize("url", ["one worker"], indirect=True)


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=url, api_key="none") as client:
        yield client


def test_answers_completions_and_chats(client):
    assert [model.id for model in client.models.list()] == [MODEL_ID]
    completion = client.completions.create(model=MODEL_ID, prompt="In the beginning", max_tokens=8, temperature=0)
    assert completion.usage.completion_tokens == 8 and completion.choices[0].text
    message = {"role": "user", "content": "And God said,"}
    chat = client.chat.completions.create(model=MODEL_ID, messages=[message], max_tokens=8, temperature=0)
    assert chat.usage.completion_tokens == 8 and chat.choices[0].message.content


def test_streams(client):
    options = {"max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(model=MODEL_ID, prompt="In the beginning", **options)
    chunks = list(client.completions.create(model=MODEL_ID, prompt="In the beginning", stream=True, **options))
    assert len(chunks) > 1
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


def test_rerouting_acts_in_the_serving_workers(cluster, url):
    """What `make demo` measures: fewer active experts with re-routing on, counted where the model runs."""
    command = [sys.executable, "-m", "examples.measure", url, "--rounds", "1", "--new-tokens", "24"]
    done = cluster.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["select_top_k"] == 2
    assert report["on"]["active_experts"] < 0.75 * report["off"]["active_experts"]
    assert report["on"]["perplexity"] > 1 and report["off"]["perplexity"] > 1
    assert "on, S = 2" in done.stdout


def test_the_page_shows_what_the_layers_run(url, client, prompts):
    origin = url.removesuffix("/v1")
    assert "Re-routing off" in httpx.get(f"{origin}/").text
    before = httpx.get(origin + ACTIVITY_PATH).json()
    assert (before["num_experts"], before["num_experts_per_token"]) == (64, 8)
    greedy(client, prompts)
    after = httpx.get(origin + ACTIVITY_PATH).json()["layers"]
    assert after.keys() == before["layers"].keys()
    for layer, counters in after.items():
        added = {name: total - before["layers"][layer][name] for name, total in counters.items()}
        assert added["steps"] > 0 and 0 < added["active_experts_after"] < added["active_experts_before"]


def test_requests_over_the_models_limits(client):
    """Errors in OpenAI's shape, which says what the limit is."""
    for too_much, message in (
        ({"prompt": [1] * 600, "max_tokens": 8}, "maximum context length is 512 tokens"),
        ({"prompt": "In", "max_tokens": 100_000}, "max_model_len=512"),
        ({"prompt": [10**8], "max_tokens": 8}, "out of vocabulary"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model=MODEL_ID, **too_much)
        assert message in refused.value.body["message"]
    with pytest.raises(openai.NotFoundError) as refused:
        client.completions.create(model="another-model", prompt="a")
    assert "another-model" in refused.value.body["message"]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return example_texts("heldout.parquet", 24, 4).tolist()


def following(client: openai.OpenAI, prompt: list[int], headers: dict[str, str] | None = None, **own) -> list[int]:
    """Returns the tokens that follow a prompt. `own` are further fields of the request."""
    options = {"model": MODEL_ID, "max_tokens": NEW, "temperature": 0, "extra_headers": headers}
    extra = {"ignore_eos": True, "return_token_ids": True, **own}
    return client.completions.create(prompt=prompt, extra_body=extra, **options).choices[0].token_ids


def greedy(client: openai.OpenAI, prompts: list[list[int]]) -> list[list[int]]:
    """Returns the tokens that follow each prompt, one request at a time."""
    return [following(client, prompt) for prompt in prompts]


@pytest.mark.slow
def test_off_is_off_while_serving(admin, client, prompts):
    """Switched off, the replica gives the tokens of an engine without the plugin; on, others."""
    options = {"model": str(MODEL), "enforce_eager": True, "max_model_len": 512}
    alone = [{"only": [place]} for place in range(len(prompts))]
    stock = [turn["tokens"][0] for turn in engines.run(options, prompts, NEW, alone, env={"VLLM_PLUGINS": ""})]
    assert greedy(client, prompts) != stock
    assert admin(enabled=False)["pending"] == []
    assert greedy(client, prompts) == stock
    admin(enabled=True, select_top_k=8)
    assert greedy(client, prompts) == stock


def test_settings_out_of_range_change_nothing(admin):
    before = admin()["settings"]
    for changes in (
        {"select_top_k": 0},
        {"select_top_k": 9},
        {"threshold": 2},
        {"artifact": "x"},
        {"traffic_price": 1},
    ):
        with pytest.raises(AdminError, match=f"answered 400: .*{next(iter(changes))}"):
            admin(**changes)
    assert admin()["settings"] == before


def test_the_admin_route_needs_its_token(url, monkeypatch):
    monkeypatch.setenv(ADMIN_TOKEN, "another-admin-token")
    with pytest.raises(AdminError, match="answered 401: Incorrect or missing admin token"):
        request_settings(url)
    monkeypatch.delenv(ADMIN_TOKEN)
    with pytest.raises(AdminError, match=f"set {ADMIN_TOKEN} or {ADMIN_TOKEN}_FILE"):
        request_settings(url)


def test_the_settings_from_a_terminal(cluster, url, admin):
    def run(*command: str) -> subprocess.CompletedProcess:
        return cluster.run(["sere-dist", "settings", *command, "--url", url], capture_output=True, text=True)

    changed = run("set", "select_top_k=3", "enabled=off", "max_rows=64")
    assert changed.returncode == 0 and "1 of 1 replicas run these settings" in changed.stdout
    assert [admin()["settings"][name] for name in ("select_top_k", "enabled", "max_rows")] == [3, False, 64]
    tried = run("try", "select_top_k=1", "--replicas", "1", "--take-back-if", "refused_share=0.5")
    assert tried.returncode == 0 and "3 (on trial: 1)" in tried.stdout, tried.stderr
    assert admin()["trial"]["take_back_if"] == {"refused_share": 0.5}
    assert "3 (on trial: 1)" in run("get").stdout
    assert "on trial: " not in run("end-trial").stdout
    refused = run("set", "select_top_k=99")
    assert refused.returncode == 1 and "select_top_k (99) must be at most" in refused.stderr
    assert "Traceback" not in run("set", "select_top_k").stderr
    nobody = cluster.run(
        ["sere-dist", "settings", "get", "--url", "http://127.0.0.1:9"], capture_output=True, text=True
    )
    assert nobody.returncode == 1 and "error: no answer from http://127.0.0.1:9/sere/settings" in nobody.stderr


def test_a_trial_that_reroutes_too_much_is_taken_back(url, admin, client, prompts):
    """The replica's own measurements end it, and are there to be read."""
    (replica,) = admin(select_top_k=8)["replicas"]
    stock = greedy(client, prompts)

    def measured() -> dict[str, float]:
        return admin()["measured"].get(replica, {})

    request_trial(url, {"changes": {"select_top_k": 1}, "take_back_if": {"rerouted_share": 0.1}})
    assert greedy(client, prompts) != stock
    assert admin()["trial"] is not None, "these were too few requests"
    for _ in range(FEWEST_REQUESTS // len(prompts)):
        greedy(client, prompts)
    eventually(lambda: admin()["trial"] is None and not admin()["pending"])
    assert re.match(rf"rerouted_share 0\.\d+ > 0.1 on replica {replica} with", admin()["taken_back"])
    assert greedy(client, prompts) == stock
    # The trial may have ended while the last requests of the loop came.
    eventually(lambda: measured().get("requests", 0) >= len(prompts))
    assert min(measured()[name] for name in ("inter_token_ms", "first_token_ms")) > 0
    assert measured()["refused_share"] == measured()["rerouted_share"] == 0 and measured()["active_experts"] == 8


def test_metrics_say_what_rerouting_did(cluster, admin, client, prompts):
    (replica,) = admin(select_top_k=3, threshold=0.1, shadow_share=1)["replicas"]

    def now() -> Counter[str]:
        return Counter(metrics(cluster, replica=replica))

    eventually(lambda: now()["ray_sere_select_top_k"] == 3)  # the counters are then no older than the change
    before = now()
    greedy(client, prompts)
    rows = len(prompts) * (NEW - 1) * 6  # one for every layer; the first token comes from the prompt's own step
    eventually(lambda: now()["ray_sere_rows_total"] - before["ray_sere_rows_total"] == rows)
    after = now()
    added = {name.removeprefix("ray_sere_"): after[name] - before[name] for name in after}
    assert added["steps_total"] == rows  # one request at a time
    assert added["active_experts_total before"] == 8 * rows
    assert 3 * rows <= added["active_experts_total after"] < 8 * rows
    assert 0 < added["rerouted_slots_total"] <= 5 * rows
    assert added["shadow_rows_total"] == rows / 6 and added["shadow_kl_total"] > 0
    assert after["ray_sere_threshold"] == pytest.approx(0.1) and after["ray_sere_enabled"] == 1


def test_requests_that_opt_out_beside_others(cluster, url, client, prompts):
    """By a header they get the tokens that they get by their bodies, and those beside them are re-routed."""

    def counted(name: str) -> int:
        layers = httpx.get(url.removesuffix("/v1") + ACTIVITY_PATH).json()["layers"]
        return sum(counters[name] for counters in layers.values())

    def requests(by: str) -> float:
        return sum(metrics(cluster, prefix="ray_sere_requests_total", opted_out_by=by).values())

    rows, requests_before = counted("rows"), {by: requests(by) for by in ("body", "header")}
    exact = [following(client, prompt, vllm_xargs={"sere": "off"}) for prompt in prompts]
    assert counted("rows") == rows, "nothing could be re-routed"
    off, slots = {"x-sere-rerouting": "off"}, counted("rerouted_slots")
    with ThreadPoolExecutor(2 * len(prompts)) as pool:
        gold = [pool.submit(following, client, prompt, off) for prompt in prompts]
        bulk = [pool.submit(following, client, prompt) for prompt in prompts]
    assert [answer.result() for answer in gold] == exact != [answer.result() for answer in bulk]
    # One row for each layer and token, but for the first, which comes from the prompt's own step.
    assert counted("rows") - rows == len(prompts) * (NEW - 1) * 6 and counted("rerouted_slots") > slots
    eventually(lambda: all(requests(by) - before == len(prompts) for by, before in requests_before.items()))


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
def test_the_engine_stops_when_a_client_leaves(cluster, url, client, streams):
    """Its answers would take minutes."""
    (core,) = processes(cluster, "VLLM::EngineCore")
    request = {"model": MODEL_ID, "prompt": ["In the beginning"] * 16, "n": 64, "max_tokens": 480}

    def worked() -> float:
        return sum(core.cpu_times()[:2])

    def is_idle() -> bool:
        before = worked()
        time.sleep(1)
        return worked() - before < 0.02  # two ticks; a core whose workers compute uses a few in a second

    before = worked()
    with (
        httpx.Client(timeout=httpx.Timeout(PATIENCE, read=None if streams else 5)) as leaving,
        contextlib.nullcontext() if streams else pytest.raises(httpx.ReadTimeout),
        leaving.stream("POST", f"{url}/completions", json=request | {"stream": streams, "ignore_eos": True}) as answer,
    ):
        assert next(answer.iter_lines())
        eventually(lambda: worked() - before > 0.05)  # it may get little of a busy machine
    left = time.monotonic()
    assert worked() - before > 0.05
    eventually(is_idle)
    print(f"the engine was idle {time.monotonic() - left:.1f} s after its client had left")
    assert client.completions.create(model=MODEL_ID, prompt="a", max_tokens=1).choices


@pytest.mark.slow
def test_a_controller_that_starts_again_keeps_the_engine(cluster, admin):
    """It keeps the replicas that can say what they are, their log file included."""
    replicas, engine = admin()["replicas"], processes(cluster, "VLLM::EngineCore")
    (killed,) = processes(cluster, "ray::ServeController")
    killed.kill()
    applications = f"{cluster.environment['RAY_API_SERVER_ADDRESS']}/api/serve/applications/"
    headers = {"Authorization": f"Bearer {cluster.environment['RAY_AUTH_TOKEN']}"}

    def is_whole() -> bool:
        (controller,) = processes(cluster, "ray::ServeController")
        answer = httpx.get(applications, headers=headers, timeout=PATIENCE).raise_for_status().json()
        deployments = answer["applications"]["sere"]["deployments"].values()
        states = {replica["state"] for deployment in deployments for replica in deployment["replicas"]}
        return controller != killed and states == {"RUNNING"}

    eventually(is_whole)
    assert admin()["replicas"] == replicas and processes(cluster, "VLLM::EngineCore") == engine


@pytest.mark.slow
def test_a_replica_and_a_keeper_that_start_again_run_the_same(cluster, admin, client, prompts):
    """Ray Serve replaces both after their processes are killed; the settings in force stay. A stream is told."""
    (killed,) = admin(select_top_k=3)["replicas"]
    expected = greedy(client, prompts)
    options = {"model": MODEL_ID, "max_tokens": 480, "extra_body": {"ignore_eos": True}}
    stream = client.completions.create(prompt="In the beginning", stream=True, **options)
    assert next(stream).choices
    for title in (REPLICA, "ray::ServeReplica:sere:SereSettings"):
        for process in processes(cluster, title):
            process.kill()
        if title == REPLICA:
            with pytest.raises(openai.APIError, match="replica that worked on this request died"):
                list(stream)

        def is_back(title=title) -> bool:
            state = admin()
            is_new = title != REPLICA or killed not in state["replicas"]
            return state["settings"]["select_top_k"] == 3 and len(state["replicas"]) == 1 and is_new

        eventually(is_back)
    eventually(lambda: greedy(client, prompts) == expected)
