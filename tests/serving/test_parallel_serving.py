"""The example model behind Ray Serve on two workers that hold half of the experts each: as one replica under tensor
parallelism, and as a gang of two replicas under data-parallel attention. Behind an API key."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from examples.tiny_moe.data import MODEL_ID, example_texts
from sere_dist.admin import ACTIVITY_PATH
from tests.serving.conftest import EXACT_KEY, KEYS
from tests.soak.load import processes
from tests.support.metrics import metrics
from tests.support.polling import eventually

TENSOR_PARALLEL = pytest.param("TP2+EP2", marks=pytest.mark.slow)
pytestmark = pytest.mark.parametrize("url", [TENSOR_PARALLEL, "DP2+EP2"], indirect=True)


def test_every_rank_answers_and_reroutes(cluster, url, admin):
    """Over HTTP; the counters are what Prometheus reads."""
    prompts = example_texts("heldout.parquet", 24, 16).tolist()
    changed = admin(select_top_k=3)
    assert changed["pending"] == []
    with openai.OpenAI(base_url=url, api_key=KEYS[1]) as client, ThreadPoolExecutor(len(prompts)) as pool:

        def answer(prompt: list[int]) -> int:
            done = client.completions.create(
                model=MODEL_ID, prompt=prompt, max_tokens=16, extra_body={"ignore_eos": True}
            )
            return done.usage.completion_tokens

        assert list(pool.map(answer, prompts)) == [16] * len(prompts)

    def every_rank_rerouted() -> bool:
        found = [metrics(cluster, replica=replica, rank=rank) for replica in changed["replicas"] for rank in "01"]
        ranks = [each for each in found if each]
        rerouted = [value for rank in ranks for name, value in rank.items() if "rerouted_slots" in name]
        return len(ranks) == 2 and len(rerouted) == 2 and min(rerouted) > 0

    eventually(every_rank_rerouted)


def test_a_key_opts_out_and_a_header_may_not(url):
    def rows() -> int:
        activity = httpx.get(url.removesuffix("/v1") + ACTIVITY_PATH, headers={"Authorization": f"Bearer {EXACT_KEY}"})
        return sum(counters["rows"] for counters in activity.raise_for_status().json()["layers"].values())

    def ask(key: str, **headers: str) -> None:
        options = {"max_tokens": 4, "extra_headers": headers, "extra_body": {"ignore_eos": True}}
        with openai.OpenAI(base_url=url, api_key=key) as client:
            client.completions.create(model=MODEL_ID, prompt="In the beginning", **options)

    before = rows()
    ask(EXACT_KEY)
    assert rows() == before, "nothing could be re-routed"
    with pytest.raises(openai.PermissionDeniedError) as refused:
        ask(KEYS[0], **{"x-sere-rerouting": "off"})
    assert "may not opt out of re-routing by the header" in refused.value.body["message"]
    ask(KEYS[0])
    assert rows() > before


def test_without_a_key_there_is_no_answer(url):
    for key in ("none", "old"):
        with openai.OpenAI(base_url=url, api_key=key) as client, pytest.raises(openai.AuthenticationError):
            client.completions.create(model=MODEL_ID, prompt="In the beginning")


@pytest.mark.slow
def test_a_group_that_loses_a_process_comes_back(cluster, url):
    """A worker, or what wakes the ranks of a data-parallel group. The last test of each group: every process of it is
    another one afterwards."""
    for title in ("VLLM::Worker", "VLLM::DPCoordinator"):
        if not (losable := processes(cluster, title)):
            assert title == "VLLM::DPCoordinator", "a tensor-parallel group has none"
            continue
        workers = {process.pid for process in processes(cluster, "VLLM::Worker")}
        assert len(workers) == 2
        losable[-1].kill()
        with openai.OpenAI(base_url=url, api_key=KEYS[1], max_retries=0, timeout=60) as client:

            def answers_again(client=client, workers=workers) -> bool:
                now = {process.pid for process in processes(cluster, "VLLM::Worker")}
                completion = {"model": MODEL_ID, "prompt": "In the beginning", "max_tokens": 8}
                return not workers & now and bool(client.completions.create(**completion).choices)

            eventually(answers_again)
