"""The ingress in this process: its guard, its errors, and its admin route, on a keeper that is not far away."""

import json
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from sere_dist.config import CHANGEABLE
from sere_dist.environment import ADMIN_TOKEN, API_KEY
from serve_apps.ingress import ENDPOINTS, SETTINGS_PATH, Guard, SereIngress
from serve_apps.settings import SettingsKeeper

TOP_K = 8
ADMIN = {"Authorization": "Bearer let-me-in"}


def near(keeper: SettingsKeeper) -> SimpleNamespace:
    """A keeper that is called as a deployment's handle is; it has no replica to wait for."""
    return SimpleNamespace(**{name: SimpleNamespace(remote=getattr(keeper, name)) for name in ("state", "change")})


def client(keeper: SettingsKeeper | None = None, **options) -> TestClient:
    ingress = SereIngress({}, {}, keeper=near(keeper) if keeper else None, **options)
    app = FastAPI()
    for name in ("get_settings", "change_settings"):
        ENDPOINTS[name](app)(getattr(ingress, name))

    @app.get("/v1/models")
    def models() -> list[str]:
        return []

    @app.get("/broken")
    def broken():
        raise RuntimeError("Traceback (most recent call last): secret")

    @app.get("/quoted")
    def quoted() -> JSONResponse:
        return JSONResponse({"error": {"message": "Traceback (most recent call last): secret"}}, 500)

    app.add_middleware(Guard)
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def keeper() -> SettingsKeeper:
    return SettingsKeeper({"artifact": "an/artifact", "select_top_k": 2}, TOP_K)


@pytest.fixture
def admin(monkeypatch, keeper) -> TestClient:
    monkeypatch.setenv(ADMIN_TOKEN, "let-me-in")
    admin = client(keeper)
    admin.headers.update(ADMIN)
    return admin


def test_without_a_token_the_admin_route_is_closed(keeper):
    answers = [client(keeper).get(SETTINGS_PATH), client(keeper).patch(SETTINGS_PATH, json={"enabled": False})]
    assert [answer.status_code for answer in answers] == [403, 403]
    assert f"the server has no {ADMIN_TOKEN}" in answers[0].json()["error"]["message"]
    assert keeper.revision == 0


@pytest.mark.parametrize("header", [None, "let-me-in", "Bearer", "Bearer ", "Bearer let-me-", "Basic let-me-in"])
def test_the_admin_route_needs_the_token(admin, keeper, header):
    admin.headers.pop("Authorization")
    headers = {} if header is None else {"Authorization": header}
    assert admin.patch(SETTINGS_PATH, json={"enabled": False}, headers=headers).status_code == 401
    assert keeper.revision == 0


def test_a_token_in_a_file_and_its_successor(tmp_path, monkeypatch, keeper):
    (tmp_path / "token").write_text("old\nlet-me-in\n")
    monkeypatch.setenv(f"{ADMIN_TOKEN}_FILE", str(tmp_path / "token"))
    for token in ("old", "let-me-in"):
        assert client(keeper).get(SETTINGS_PATH, headers={"Authorization": f"Bearer {token}"}).status_code == 200
    monkeypatch.setenv(ADMIN_TOKEN, "another")
    with pytest.raises(ValueError, match="are both set: unset one"):
        client(keeper)


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
    monkeypatch.setenv(API_KEY, "key")
    guarded = client(require_api_key=True)
    assert guarded.get("/v1/models", headers={"Authorization": "Bearer key"}).status_code == 200
    for path in ("/v1/models", "/openapi.json", "/nowhere"):
        answer = guarded.get(path, headers={"Authorization": "Bearer kei"})
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    monkeypatch.delenv(API_KEY)
    assert client().get("/v1/models").status_code == 200


def test_the_admin_route_needs_no_key(admin, monkeypatch, keeper):
    """Its own token is enough, under a route prefix too."""
    monkeypatch.setenv(API_KEY, "key")
    for prefix in ("", "/moe"):
        prefixed = client(keeper)
        prefixed.app.root_path = prefix
        assert prefixed.get(prefix + SETTINGS_PATH, headers=ADMIN).status_code == 200
        assert prefixed.get(prefix + "/v1/models", headers=ADMIN).status_code == 401


@pytest.mark.parametrize("path", ["/broken", "/quoted"])
def test_no_traceback_leaves(admin, path):
    answer = admin.get(path, headers={"x-request-id": "abc"})
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "Internal error; the server's log has it under request id abc."


def test_a_model_that_is_not_rerouted_has_no_settings(monkeypatch):
    monkeypatch.setenv(ADMIN_TOKEN, "let-me-in")
    assert client().get(SETTINGS_PATH, headers=ADMIN).status_code == 404


def test_reads_and_changes(admin):
    assert admin.get(SETTINGS_PATH).json()["settings"]["select_top_k"] == 2
    changed = admin.patch(SETTINGS_PATH, json={"select_top_k": 3, "max_rows": None})
    assert changed.status_code == 200 and changed.json()["settings"]["select_top_k"] == 3
    assert admin.get(SETTINGS_PATH).json() == changed.json()


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
    """Every body is answered 200 or 400, and what is in force stays within the settings' range."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ADMIN_TOKEN, "let-me-in")
        keeper = SettingsKeeper({"artifact": "an/artifact", "select_top_k": 2}, TOP_K)
        admin = client(keeper)
    before = admin.get(SETTINGS_PATH, headers=ADMIN).json()
    answer = admin.patch(SETTINGS_PATH, content=body, headers=ADMIN)
    after = admin.get(SETTINGS_PATH, headers=ADMIN).json()
    assert answer.status_code in (200, 400)
    if answer.status_code == 400:
        assert answer.json()["error"]["message"] and after == before
    else:
        changed = after["settings"]
        assert 1 <= changed["select_top_k"] <= TOP_K and 0 <= changed["threshold"] <= 1
        assert 2**31 > (changed["max_rows"] or 0) >= 0 <= changed["min_rows"] < 2**31
        assert changed["max_rows"] is None or changed["max_rows"] >= changed["min_rows"]


@given(header=st.binary(max_size=30).filter(lambda header: b"let-me-in" not in header))
def test_no_other_header_opens_the_admin_route(header):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ADMIN_TOKEN, "let-me-in")
        ingress = SereIngress({}, {}, keeper=None)
    request = SimpleNamespace(scope={"headers": [(b"authorization", header)]})
    assert ingress._refused(request).status_code == 401
