"""The ingress in this process: its guard, its errors, and its admin route, on a keeper that is not far away."""

import asyncio
import contextlib
import json
import os
import pickle
import re
from collections.abc import Sequence
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from ray.serve.llm.ingress import OpenAiIngress
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.websockets import WebSocketDisconnect
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.tokenize.protocol import TokenizeCompletionRequest
from vllm.exceptions import QueueOverflowError

from sere_dist.admin import ACTIVITY_PATH, CONTROL_PATH
from sere_dist.config import CHANGEABLE
from sere_dist.environment import ADMIN_TOKEN, API_KEY, EXACT_API_KEY
from sere_dist.method.counters import COUNTERS
from sere_dist.vllm_plugin.rows import OPT_OUT, opts_out
from serve_apps.control import ControlConfig
from serve_apps.ingress import (
    ENDPOINTS,
    PAGE,
    PAGE_ENDPOINT,
    SETTINGS_PATH,
    TRIAL_PATH,
    ReadOrCancel,
    SereIngress,
    count_prompts,
    guard,
    http_error,
)
from serve_apps.server import EndsWithEngine, EngineIsFull
from serve_apps.settings import SettingsKeeper

TOP_K = 8
TOKEN, KEY = "let-me-in-for-all", "the-key-of-a-door"
ADMIN = {"Authorization": f"Bearer {TOKEN}"}
LARGEST = 200_000  # bytes of a body


class Nobody:
    """A cluster without replicas."""

    def load(self) -> None:
        return None

    def save(self, kept: dict) -> None:
        pass

    def replicas(self) -> set[str]:
        return set()


def near(keeper: SettingsKeeper) -> SimpleNamespace:
    """A keeper that is called as a deployment's handle is; it has no replica to wait for."""
    return SimpleNamespace(
        **{name: SimpleNamespace(remote=getattr(keeper, name)) for name in ("state", "change", "try_out", "pin")}
    )


def client(
    keeper: SettingsKeeper | None = None, origins: Sequence[str] = (), *, has_page: bool = False, **options
) -> TestClient:
    ingress = SereIngress({}, {}, keeper=near(keeper) if keeper else None, **options)
    app = FastAPI()
    for name in ("get_settings", "change_settings", "start_trial", "end_trial", "pin_price", "activity"):
        ENDPOINTS[name](app)(getattr(ingress, name))
    if has_page:
        PAGE_ENDPOINT["page"](app)(ingress.page)

    @app.get("/v1/models")
    def models() -> list[str]:
        return []

    @app.post("/v1/completions")
    async def completions(body: dict) -> int:
        return len(body["prompt"])

    @app.get("/broken")
    def broken():
        raise RuntimeError("Traceback (most recent call last): secret")

    @app.get("/quoted")
    def quoted() -> JSONResponse:
        return JSONResponse({"error": {"message": "Traceback (most recent call last): secret"}}, 500)

    app.add_middleware(CORSMiddleware, allow_origins=["*"], allow_credentials=True)  # as Ray Serve LLM's has it
    guard(app, origins, max_body_bytes=LARGEST, max_requests=100, has_page=has_page)
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def keeper() -> SettingsKeeper:
    return SettingsKeeper({"artifact": "an/artifact", "select_top_k": 2}, TOP_K, Nobody())


@pytest.fixture
def admin(monkeypatch, keeper) -> TestClient:
    monkeypatch.setenv(ADMIN_TOKEN, TOKEN)
    admin = client(keeper)
    admin.headers.update(ADMIN)
    return admin


def test_without_a_token_the_admin_route_is_closed(keeper):
    answers = [client(keeper).get(SETTINGS_PATH), client(keeper).patch(SETTINGS_PATH, json={"enabled": False})]
    assert [answer.status_code for answer in answers] == [403, 403]
    assert f"the server has no {ADMIN_TOKEN}" in answers[0].json()["error"]["message"]
    assert keeper.revision == 0


@pytest.mark.parametrize("header", [None, TOKEN, "Bearer", "Bearer ", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}"])
def test_the_admin_route_needs_the_token(admin, keeper, header):
    admin.headers.pop("Authorization")
    headers = {} if header is None else {"Authorization": header}
    assert admin.patch(SETTINGS_PATH, json={"enabled": False}, headers=headers).status_code == 401
    assert keeper.revision == 0


def test_a_token_in_a_file_and_its_successor(tmp_path, monkeypatch, keeper):
    (tmp_path / "token").write_text(f"an-older-{TOKEN}\n{TOKEN}\n")
    monkeypatch.setenv(f"{ADMIN_TOKEN}_FILE", str(tmp_path / "token"))
    for token in (f"an-older-{TOKEN}", TOKEN):
        assert client(keeper).get(SETTINGS_PATH, headers={"Authorization": f"Bearer {token}"}).status_code == 200
    monkeypatch.setenv(ADMIN_TOKEN, "another-token-yet")
    with pytest.raises(ValueError, match="are both set: unset one"):
        client(keeper)


def test_one_request_too_many_is_refused_before_anything_is_done_for_it():
    """Only what asks the model counts, and only while it is worked on, however it ends."""
    app, begun, ends = FastAPI(), [], asyncio.Event()

    @app.post("/v1/completions")
    async def completions(body: dict) -> int:
        begun.append(body)
        await ends.wait()
        return 1 // body["divisor"]

    @app.get("/v1/models")
    async def models() -> list:
        return []

    guard(app, [], max_body_bytes=LARGEST, max_requests=2)

    async def ask() -> None:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://ingress") as client:

            def post(divisor: int) -> asyncio.Task[httpx.Response]:
                return asyncio.create_task(client.post("/v1/completions", json={"divisor": divisor}))

            admitted = [post(1), post(0)]
            while len(begun) < 2:
                await asyncio.sleep(0.01)
            refused = await post(1)
            assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
            error = refused.json()["error"]
            assert (
                error["type"] == "service_unavailable" and "works on 2 requests, and takes no more" in error["message"]
            )
            assert (await client.get("/v1/models")).status_code == 200
            ends.set()
            assert [(await each).status_code for each in admitted] == [200, 500]
            assert len(begun) == 2
            assert [(await post(1)).status_code for _ in range(3)] == [200] * 3

    asyncio.run(ask())


@pytest.mark.parametrize("content", [None, "", " \n"])
def test_a_file_without_a_secret_stops_the_start(tmp_path, monkeypatch, keeper, content):
    if content is not None:
        (tmp_path / "token").write_text(content)
    monkeypatch.setenv(f"{ADMIN_TOKEN}_FILE", str(tmp_path / "token"))
    with pytest.raises(ValueError, match="can't be read" if content is None else "holds nothing"):
        client(keeper)


def test_a_key_that_is_required_and_missing_stops_the_start():
    with pytest.raises(ValueError, match=f"neither {API_KEY} nor {API_KEY}_FILE"):
        client(require_api_key=True)


def test_clients_need_the_key(monkeypatch):
    monkeypatch.setenv(API_KEY, KEY)
    guarded = client(require_api_key=True)
    assert guarded.get("/v1/models", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
    for path in ("/v1/models", "/openapi.json", "/nowhere"):
        answer = guarded.get(path, headers={"Authorization": f"Bearer {KEY[:-1]}"})
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    monkeypatch.delenv(API_KEY)
    assert client().get("/v1/models").status_code == 200


def test_the_admin_route_needs_no_key(admin, monkeypatch, keeper):
    """Its own token is enough, under a route prefix too."""
    monkeypatch.setenv(API_KEY, KEY)
    for prefix in ("", "/moe"):
        prefixed = client(keeper)
        prefixed.app.root_path = prefix
        assert prefixed.get(prefix + SETTINGS_PATH, headers=ADMIN).status_code == 200
        assert prefixed.get(prefix + "/v1/models", headers=ADMIN).status_code == 401


@pytest.mark.parametrize("name", ["x-request-timeout-seconds", "X-Request-Disconnect-Disabled"])
def test_a_request_cannot_turn_timeouts_off(name):
    """Ray Serve's proxy reads these headers."""
    answer = client().get("/v1/models", headers={name: "0"})
    assert answer.status_code == 400 and name.lower() in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/broken", "/quoted"])
def test_no_traceback_leaves(admin, path):
    answer = admin.get(path, headers={"x-request-id": "abc"})
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "Internal error; the server's log has it under request id abc."


def test_a_model_that_is_not_rerouted_has_no_settings(monkeypatch):
    monkeypatch.setenv(ADMIN_TOKEN, TOKEN)
    assert client().get(SETTINGS_PATH, headers=ADMIN).status_code == 404


def test_reads_and_changes(admin):
    assert admin.get(SETTINGS_PATH).json()["settings"]["select_top_k"] == 2
    changed = admin.patch(SETTINGS_PATH, json={"select_top_k": 3, "max_rows": None})
    assert changed.status_code == 202, "no replica has confirmed"
    assert changed.json()["settings"]["select_top_k"] == 3
    assert admin.get(SETTINGS_PATH).json() == changed.json()


def test_starts_and_ends_a_trial(admin, keeper):
    trial = {"changes": {"select_top_k": 3}, "replicas": 1}
    started = admin.put(TRIAL_PATH, json=trial)
    assert started.status_code == 202, "no replica has confirmed"
    assert started.json()["trial"] == trial | {"take_back_if": {}, "triers": []}
    refused = admin.put(TRIAL_PATH, json={"changes": {"select_top_k": 99}})
    assert refused.status_code == 400 and "select_top_k (99)" in refused.json()["error"]["message"]
    assert admin.get(SETTINGS_PATH).json() == started.json()
    admin.headers.pop("Authorization")
    assert admin.delete(TRIAL_PATH).status_code == admin.put(TRIAL_PATH, json=trial).status_code == 401
    ended = admin.delete(TRIAL_PATH, headers=ADMIN)
    assert ended.status_code == 202 and ended.json()["trial"] is None and keeper.trial is None


def test_pins_the_price(monkeypatch):
    monkeypatch.setenv(ADMIN_TOKEN, TOKEN)
    control = ControlConfig(prices=[0, 0.01], waiting=4)
    projection = {"artifact": "an/artifact", "policy": "projection", "select_top_k": 1}
    keeper = SettingsKeeper(projection, TOP_K, Nobody(), control=control)
    with client(keeper) as admin:
        assert admin.put(CONTROL_PATH, json={"pinned": True}).status_code == 401
        admin.headers |= ADMIN
        pinned = admin.put(CONTROL_PATH, json={"pinned": True})
        assert pinned.status_code == 202, "no replica has confirmed"
        assert pinned.json()["control"] == {"price": 0, "pinned": True, "why": "nothing was decided yet"}
        refused = admin.put(CONTROL_PATH, json={"pinned": "perhaps"})
        assert refused.status_code == 400 and "the body must be" in refused.json()["error"]["message"]
        assert admin.get(SETTINGS_PATH).json() == pinned.json()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=4), children, max_size=3),
    max_leaves=5,
)
settings_near_valid = st.dictionaries(
    st.sampled_from((*CHANGEABLE, "artifact", "unknown")),
    st.sampled_from((0, 1, TOP_K, TOP_K + 1, -1, 2**70, 0.5, 1e308, True, "2", "decode", None)) | json_values,
    max_size=4,
)
bodies = st.binary(max_size=40) | (json_values | settings_near_valid).map(lambda value: json.dumps(value).encode())


@given(body=bodies | st.just(b"[" * 100_000))
def test_whatever_is_sent_is_refused_or_valid(body):
    """Every body is answered 202 or 400, and what is in force stays within the settings' range."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ADMIN_TOKEN, TOKEN)
        keeper = SettingsKeeper({"artifact": "an/artifact", "select_top_k": 2}, TOP_K, Nobody())
        admin = client(keeper)
    before = admin.get(SETTINGS_PATH, headers=ADMIN).json()
    answer = admin.patch(SETTINGS_PATH, content=body, headers=ADMIN)
    after = admin.get(SETTINGS_PATH, headers=ADMIN).json()
    assert answer.status_code in (202, 400)
    if answer.status_code == 400:
        assert answer.json()["error"]["message"] and after == before
    else:
        changed = after["settings"]
        needs_one = changed["enabled"] and not changed["expert_price"] + changed["balance_price"]
        assert (1 if needs_one else 0) <= changed["select_top_k"] <= TOP_K and 0 <= changed["threshold"] <= 1
        assert 2**31 > (changed["max_rows"] or 0) >= 0 <= changed["min_rows"] < 2**31
        assert changed["max_rows"] is None or changed["max_rows"] >= changed["min_rows"]


@given(header=st.binary(max_size=30).filter(lambda header: TOKEN.encode() not in header))
def test_no_other_header_opens_the_admin_route(header):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ADMIN_TOKEN, TOKEN)
        ingress = SereIngress({}, {}, keeper=None)
    request = SimpleNamespace(scope={"headers": [(b"authorization", header)]})
    assert ingress._refused(request).status_code == 401


def test_a_file_of_keys_that_changes_is_read_again(tmp_path, monkeypatch, caplog):
    file = tmp_path / "keys"
    file.write_text(KEY)
    monkeypatch.setenv(f"{API_KEY}_FILE", str(file))
    guarded = client()

    def status(key: str) -> int:
        return guarded.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code

    assert (status(KEY), status("another-key-of-it")) == (200, 401)
    (tmp_path / "new").write_text("another-key-of-it")
    os.replace(tmp_path / "new", file)
    assert (status(KEY), status("another-key-of-it")) == (401, 200)
    for unusable in ("", "qwerty"):
        (tmp_path / "new").write_text(unusable)
        os.replace(tmp_path / "new", file)
        assert status("another-key-of-it") == 200, "the last ones stay"
    file.unlink()
    assert status("another-key-of-it") == 200
    assert "another-key" not in caplog.text


@pytest.mark.parametrize("secret", ["qwerty", "a pass phrase of words", "one-that-is-long-enough\nqwerty"])
def test_secrets_that_are_easily_guessed_stop_the_start(monkeypatch, secret):
    monkeypatch.setenv(API_KEY, secret)
    with pytest.raises(ValueError, match="shorter than 16 characters, or has white space") as refused:
        client()
    assert secret not in str(refused.value)


def test_no_secret_is_both_key_and_token(monkeypatch):
    monkeypatch.setenv(ADMIN_TOKEN, TOKEN)
    monkeypatch.setenv(API_KEY, f"{KEY}\n{TOKEN}")
    with pytest.raises(ValueError, match="is an API key as well"):
        client()


def asking(key: str = "none", **headers: str) -> Request:
    """A request as the ingress sees it."""
    named = {"authorization": f"Bearer {key}"} | {name.replace("_", "-"): value for name, value in headers.items()}
    pairs = [(name.encode(), value.encode()) for name, value in named.items()]
    return Request({"type": "http", "headers": pairs})


def test_keys_and_headers_that_opt_out(monkeypatch):
    """The requests of some keys are not re-routed, nor those that a gateway marks, whatever their bodies say."""
    monkeypatch.setenv(API_KEY, KEY)
    monkeypatch.setenv(EXACT_API_KEY, "the-key-of-the-exact")
    ingress = SereIngress({}, {}, require_api_key=True)

    def is_out(request: Request) -> bool:
        body = CompletionRequest(prompt="a", vllm_xargs={OPT_OUT: "on", "other": 1})
        ingress._mark(body, request)
        assert body.vllm_xargs is not None and body.vllm_xargs["other"] == 1 and body.cache_salt is None
        return opts_out(body.vllm_xargs)

    assert not is_out(asking(KEY)) and not is_out(asking(KEY, x_sere_rerouting="on"))
    assert is_out(asking("the-key-of-the-exact")) and is_out(asking(KEY, x_sere_rerouting="off"))
    ingress._mark(TokenizeCompletionRequest(prompt="a"), asking("the-key-of-the-exact"))  # it has nothing to mark
    opened = client().get("/v1/models", headers={"Authorization": "Bearer the-key-of-the-exact"})
    assert opened.status_code == 200


@pytest.mark.parametrize("allowed", [["header", "body"], ["header"], ["body"], []], ids=str)
@pytest.mark.parametrize("claimed", [["header", "body"], ["header"], ["body"], []], ids=str)
def test_who_may_opt_out(monkeypatch, allowed, claimed):
    """One permission is enough. A request that has none is refused, not re-routed in silence; a key needs none."""
    monkeypatch.setenv(API_KEY, KEY)
    monkeypatch.setenv(EXACT_API_KEY, "the-key-of-the-exact")
    ingress = SereIngress({}, {}, opt_out_by=allowed)
    headers = {"x_sere_rerouting": "off"} if "header" in claimed else {}

    def marked(key: str) -> CompletionRequest:
        body = CompletionRequest(prompt="a", vllm_xargs={OPT_OUT: "off" if "body" in claimed else "on"})
        ingress._mark(body, asking(key, **headers))
        return body

    assert opts_out(marked("the-key-of-the-exact").vllm_xargs)
    if not claimed or set(claimed) & set(allowed):
        assert opts_out(marked(KEY).vllm_xargs) == bool(claimed)
    else:
        named = {"header": "the header x-sere-rerouting", "body": "vllm_xargs.sere"}[claimed[0]]
        with pytest.raises(HTTPException, match=f"may not opt out of re-routing by {named} here") as refused:
            marked(KEY)
        assert refused.value.status_code == 403


def test_a_request_may_keep_its_experts_and_share_them(monkeypatch):
    """By header or body, under the same permissions; the header comes first. A key hides what it runs unless told."""
    monkeypatch.setenv(API_KEY, KEY)
    monkeypatch.setenv(EXACT_API_KEY, "the-key-of-the-exact")

    def marked(key: str, in_body: str, allowed=("header", "body"), **headers: str) -> str:
        body = CompletionRequest(prompt="a", vllm_xargs={OPT_OUT: in_body})
        SereIngress({}, {}, opt_out_by=allowed)._mark(body, asking(key, **headers))
        assert body.vllm_xargs is not None
        return str(body.vllm_xargs[OPT_OUT])

    assert marked(KEY, "keep") == marked(KEY, "on", x_sere_rerouting="keep") == "keep"
    assert marked(KEY, "keep", x_sere_rerouting="off") == marked("the-key-of-the-exact", "on") == "off"
    assert marked("the-key-of-the-exact", "keep") == "keep"
    with pytest.raises(HTTPException, match="may not opt out"):
        marked(KEY, "keep", allowed=["header"])


def test_a_prefix_cache_per_key(monkeypatch):
    """A salt depends on the key and on the client's own, and tells nothing of either."""
    monkeypatch.setenv(API_KEY, f"{KEY}\nanother-key-of-it")
    ingress = SereIngress({}, {}, cache_per_key=True)

    def salt(key: str, own: str | None = None) -> str | None:
        body = ChatCompletionRequest(messages=[{"role": "user", "content": "a"}], cache_salt=own)
        ingress._mark(body, asking(key))
        return body.cache_salt

    salts = [salt(KEY), salt("another-key-of-it"), salt(KEY, "own"), salt("another-key-of-it", "own")]
    assert len(set(salts)) == 4 and salt(KEY) == salts[0]
    assert not any(secret in str(salts) for secret in (KEY, "own"))


class Answer:
    """A replica's answer of three parts, the last of which never comes."""

    def __init__(self):
        self.cancelled = False

    async def __aiter__(self):
        yield 1
        yield 2
        await asyncio.sleep(1000)

    def cancel(self) -> None:
        self.cancelled = True


@pytest.mark.parametrize("why", ["timeout", "left"])
def test_an_answer_that_nobody_reads_is_cancelled(why):
    """The router's own timeout does not: the engine would go on."""
    answer = Answer()
    handle = SimpleNamespace(chat=SimpleNamespace(remote=lambda body: answer))
    handle.options = lambda session_id: handle

    async def read() -> list[int]:
        parts = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                async with contextlib.aclosing(ReadOrCancel(handle).options(session_id="a").chat.remote("b")) as got:
                    async for part in got:
                        parts.append(part)
                        if why == "left":
                            break
        return parts

    assert asyncio.run(read()) == ([1] if why == "left" else [1, 2])
    assert answer.cancelled


def test_the_log_says_who_changed_what(admin, caplog):
    with caplog.at_level("WARNING", logger="ray.serve"):
        admin.patch(SETTINGS_PATH, json={"select_top_k": 3}, headers={"x-request-id": "abc"})
        admin.patch(SETTINGS_PATH, json={"select_top_k": 99})
    changed, refused = (record.getMessage() for record in caplog.records if "audit" in record.getMessage())
    assert "from {'select_top_k': 2} to {'select_top_k': 3}, by token " in changed and "request abc" in changed
    assert "stay as they are: select_top_k (99) must be" in refused
    assert TOKEN not in caplog.text


def test_a_body_that_is_too_large_is_refused():
    """Whether it says so at once or comes in parts; one that just fits is answered."""
    app = client()
    app.headers["Content-Type"] = "application/json"
    prompt = "a" * (LARGEST - len('{"prompt":""}'))
    fits = json.dumps({"prompt": prompt}, separators=(",", ":")).encode()
    too_large = json.dumps({"prompt": prompt + "a"}, separators=(",", ":")).encode()
    assert app.post("/v1/completions", content=fits).json() == len(prompt)
    assert app.post("/v1/completions", content=iter([fits[:9], fits[9:]])).json() == len(prompt)
    for content in (too_large, iter([too_large[:9], too_large[9:]])):
        answer = app.post("/v1/completions", content=content)
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"


def test_web_pages_may_use_the_api_from_the_origins_that_are_named(monkeypatch):
    """A browser asks first, without a key."""
    monkeypatch.setenv(API_KEY, KEY)
    ours, evil = "https://chat.example", "http://evil.example"
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for origins in ([], [ours]):
        app = client(origins=origins)
        for origin in (ours, evil):
            headers = {"Origin": origin}
            first = app.options("/v1/completions", headers=headers | asked)
            then = app.get("/v1/models", headers=headers | {"Authorization": f"Bearer {KEY}"})
            allowed = [answer.headers.get("access-control-allow-origin") for answer in (first, then)]
            assert allowed == ([ours, ours] if origin in origins else [None, None])
            assert first.status_code == (200 if origin in origins else 400 if origins else 401)
            assert then.status_code == 200


def test_the_page_is_open_and_asks_nobody_else(monkeypatch):
    monkeypatch.setenv(API_KEY, KEY)
    answer = client(has_page=True).get("/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    assert answer.text == PAGE.read_text()
    allowed = dict(each.strip().split(" ", 1) for each in answer.headers["content-security-policy"].split(";"))
    assert allowed["default-src"] == "'none'" and allowed["connect-src"] == "'self'"
    assert set(re.findall(r"https?://[\w.]+", answer.text)) == {"http://host", "http://www.w3.org"}, (
        "an example, a name"
    )
    assert client(has_page=True).get("/v1/models").status_code == 401
    assert client().get("/").status_code == 401, "switched off"


class Replicas:
    """A deployment's handle whose replicas return these."""

    def __init__(self, *returned):
        self.returned = returned

    def broadcast(self, method: str) -> "Replicas":
        assert method == "activity"
        return self

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list:
        assert timeout_s > 0 and return_exceptions
        if TimeoutError in self.returned:
            raise TimeoutError
        return list(self.returned)


def test_activity_is_summed_over_the_replicas(monkeypatch, keeper):
    def layers(**steps):
        return {int(name[1:]): dict.fromkeys(COUNTERS, 3 * n) | {"steps": n, "other": []} for name, n in steps.items()}

    monkeypatch.setenv(API_KEY, KEY)
    shape = {"num_experts": 64, "num_experts_per_token": 8}
    replicas = Replicas(layers(_0=1, _1=2), RuntimeError("it is starting"), layers(_0=10, _1=20))
    asking = client(keeper, replicas=replicas, shape=shape)
    assert asking.get(ACTIVITY_PATH).status_code == 401, "what others' requests run is for clients alone"
    found = asking.get(ACTIVITY_PATH, headers={"Authorization": f"Bearer {KEY}"}).json()
    assert found.keys() == {*shape, "layers"} and found["num_experts"] == 64
    assert {layer: of["steps"] for layer, of in found["layers"].items()} == {"0": 11, "1": 22}
    assert found["layers"]["1"]["active_experts_after"] == 66 and found["layers"]["1"].keys() == set(COUNTERS)


def test_replicas_that_do_not_say_what_they_run(keeper):
    assert client(keeper, replicas=Replicas(TimeoutError)).get(ACTIVITY_PATH).status_code == 503
    assert client().get(ACTIVITY_PATH).status_code == 404


def test_websockets_are_closed():
    with pytest.raises(WebSocketDisconnect), client().websocket_connect("/v1/realtime"):
        pass


def test_names_of_models_leave_nothing_behind():
    """Ray Serve LLM would keep a handle for each `NAME:ADAPTER`."""
    ingress = SereIngress({"tiny-moe": None}, {"tiny-moe": None})
    assert asyncio.run(ingress._get_model_id("tiny-moe")) == asyncio.run(ingress._get_model_id(None)) == "tiny-moe"
    for name in ("tiny-moe:" + "x" * 10**6, "another"):
        with pytest.raises(HTTPException, match="There is no model") as refused:
            asyncio.run(ingress._get_model_id(name))
        assert refused.value.status_code == 404 and len(refused.value.detail) < 200


def test_a_full_engine_is_no_error_of_the_server(monkeypatch):
    """vLLM's admission control, as it reaches the ingress: 503, and when to come again."""

    class Replica(EndsWithEngine):
        async def _has_engine(self) -> bool:
            return True

    async def refuses():
        raise QueueOverflowError
        yield

    replica = object.__new__(Replica)
    replica.requests = {"refused": 0}

    async def response(*_args, **_named):
        async for part in replica._while_it_lives(refuses()):
            yield part

    async def ask() -> None:
        ingress = SereIngress({"tiny-moe": None}, {"tiny-moe": None})
        async for _ in ingress._get_response(body=None, call_method="completions"):
            pass

    monkeypatch.setattr(OpenAiIngress, "_get_response", response)
    with pytest.raises(HTTPException, match="currently busy") as refused:
        asyncio.run(ask())
    assert replica.requests["refused"] == 1
    answer = http_error(None, refused.value)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    crossed = pickle.loads(pickle.dumps(EngineIsFull("busy")))
    assert isinstance(crossed, EngineIsFull) and crossed.args == ("busy",)


@pytest.mark.parametrize(
    ("body", "counted"),
    [("a text", 1), ([1, 2, 3], 1), (["a", "b"], 2), ([[1, 2], [3]], 2), ([], 1), (None, 1)],
)
def test_prompts_are_counted(body, counted):
    assert count_prompts(body) == counted
