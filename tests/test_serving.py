"""The example model behind Ray Serve: real replicas, real HTTP, the official client."""

import json
import os
import socket
import subprocess
import sys

import openai
import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from examples import demo
from examples.local_cluster import free_ports
from serve_apps.sere import build_app
from tests.conftest import MODEL

APPS = sorted((demo.ROOT / "serve_apps").glob("*.yaml"))


@pytest.fixture(scope="module")
def url(cluster, artifact_path):
    with demo.served(cluster, free_ports(1)[0], artifact_path) as url:
        yield url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=url, api_key="none") as client:
        yield client


def test_answers_completions_and_chats(client):
    assert [model.id for model in client.models.list()] == [demo.MODEL_ID]
    completion = client.completions.create(model=demo.MODEL_ID, prompt="In the beginning", max_tokens=8, temperature=0)
    assert completion.usage.completion_tokens == 8 and completion.choices[0].text
    message = {"role": "user", "content": "And God said,"}
    chat = client.chat.completions.create(model=demo.MODEL_ID, messages=[message], max_tokens=8, temperature=0)
    assert chat.usage.completion_tokens == 8 and chat.choices[0].message.content


def test_streams(client):
    options = {"max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(model=demo.MODEL_ID, prompt="In the beginning", **options)
    chunks = list(client.completions.create(model=demo.MODEL_ID, prompt="In the beginning", stream=True, **options))
    assert len(chunks) > 1
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


def test_the_clients_mistakes_are_the_clients(client):
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="another-model", prompt="a")
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=demo.MODEL_ID, prompt=[1] * 600, max_tokens=8)


def test_rerouting_acts_in_the_serving_workers(cluster, url):
    """What `make demo` measures: fewer active experts with re-routing on, counted where the model runs."""
    command = [sys.executable, "-m", "examples.measure", url, "--rounds", "1", "--new-tokens", "24"]
    done = cluster.run(command, cwd=demo.ROOT, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["select_top_k"] == 2
    assert report["on"]["active_experts"] < 0.75 * report["off"]["active_experts"]
    assert report["on"]["perplexity"] > 1 and report["off"]["perplexity"] > 1
    assert "on, S = 2" in done.stdout


@pytest.mark.parametrize("path", APPS, ids=lambda path: path.name)
def test_application_files_fit_rays_schema(path):
    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    assert [application.import_path for application in schema.applications] == ["serve_apps.sere:build_app"]


def arguments(artifact, **changes) -> dict:
    return {"model": str(MODEL), "rerouting": {"artifact": str(artifact), "select_top_k": 2, **changes}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"select_top_k": 0}, "select_top_k\n.*greater than or equal to 1"),
        ({"select_top_k": 9}, r"select_top_k \(9\) must be between 1 and the model's experts a token \(8\)"),
        ({"threshold": 1.5}, "threshold\n"),
        ({"artifact": "nowhere"}, "no artifact at nowhere"),
    ],
)
def test_bad_arguments_stop_the_deployment(artifact_path, changes, message):
    with pytest.raises(ValueError, match=message):
        build_app(arguments(**{"artifact": artifact_path, **changes}))


def test_unknown_arguments_are_refused(artifact_path):
    with pytest.raises(ValidationError, match="tensor_paralel_size\n"):
        build_app({**arguments(artifact_path), "tensor_paralel_size": 2})


def test_a_plugin_that_would_not_load_is_refused(artifact_path, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "something_else")
    with pytest.raises(ValueError, match="leaves sere_dist out"):
        build_app(arguments(artifact_path))


def test_replicas_without_the_plugin_are_refused(artifact_path):
    with pytest.raises(ValueError, match="leaves sere_dist out"):
        build_app({**arguments(artifact_path), "environment": {"VLLM_PLUGINS": ""}})
    with pytest.raises(ValueError, match="set by `rerouting`"):
        build_app({"model": str(MODEL), "engine": {"additional_config": {"sere": {"select_top_k": 99}}}})


def test_a_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "examples.demo", "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=demo.ROOT, env=dict(os.environ), timeout=60)
    assert done.returncode == 1
    assert f"error: port {port} is in use" in done.stderr and "Traceback" not in done.stderr
