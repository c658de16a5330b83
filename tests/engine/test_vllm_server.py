"""vLLM's own OpenAI server, told and fed as users of the reference implementation do."""

import json
import os
import subprocess
import sys
import time

import openai
import pytest
from safetensors.torch import load_file, save_file

from examples.tiny_moe.data import MODEL
from sere_dist.artifact.folder import Artifact
from sere_dist.testing.local_cluster import free_ports

PROMPT, NEW = "In the beginning", 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, artifact_path):
    """The example model saved again with a similarity matrix in each MoE layer, and no artifact."""
    folder = tmp_path_factory.mktemp("reference") / "model"
    folder.mkdir()
    for file in MODEL.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).symlink_to(file)
    tensors = load_file(MODEL / "model.safetensors")
    tables = Artifact.load(artifact_path).tables
    matrices = {f"model.layers.{layer}.mlp.similarity_matrix": of.similarity_EE for layer, of in tables.items()}
    save_file(tensors | matrices, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    """Yields a client, and the server's log."""
    port, log = free_ports(1)[0], tmp_path_factory.mktemp("server") / "log"
    overrides = {"architectures": ["Qwen3MoeForCausalLMSERE"], "select_top_k": 1, "threshold": 0.0}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    command += [
        "--port",
        str(port),
        "--enforce-eager",
        "--max-model-len",
        "256",
        "--hf-overrides",
        json.dumps(overrides),
    ]
    command += ["--additional-config", json.dumps({"sere": {"select_top_k": 2}}), "--served-model-name", "moe"]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ})
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        while True:
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                assert process.poll() is None, log.read_text()[-5000:]
                time.sleep(0.5)
        yield client, log
    finally:
        process.terminate()
        process.wait(60)


def complete(client, **extra) -> str:
    answer = client.completions.create(
        model="moe", prompt=PROMPT, max_tokens=NEW, temperature=0, extra_body={"ignore_eos": True, **extra}
    )
    return answer.choices[0].text


def test_its_settings_and_checkpoint_serve(server):
    client, log = server
    rerouted, off = complete(client), complete(client, vllm_xargs={"sere": "off"})
    assert rerouted != off, "two of eight experts give another text"
    assert rerouted == complete(client)
    # select_top_k of --additional-config wins over that of --hf-overrides.
    assert "re-routes 6 MoE layers: select_top_k 2 of 8" in log.read_text()
