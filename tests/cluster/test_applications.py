"""Every application file of ours, as the builder makes it up on the cluster."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from ray.serve.schema import ServeDeploySchema
from transformers import AutoConfig

from examples.application import ROOT
from examples.tiny_moe.data import MODEL
from sere_dist.moe import MoeShape
from tests.support.artifacts import small_artifact

APPS = sorted((ROOT / "serve_apps").glob("*.yaml"))
SHAPES = ROOT / "benchmarks" / "shapes"
# The published shape of each model that a file names.
SHAPE_OF = {
    "examples/tiny_moe/model": MODEL,
    "build/smollm2-moe": SHAPES / "smollm2-moe",
    "Qwen/Qwen1.5-MoE-A2.7B-Chat": SHAPES / "qwen1.5-moe-a2.7b",
    "deepseek-ai/DeepSeek-V2-Lite-Chat": SHAPES / "deepseek-v2-lite",
    "Qwen/Qwen3-30B-A3B": SHAPES / "qwen3-30b-a3b",
}


@pytest.fixture(scope="module")
def built(cluster, tmp_path_factory) -> dict[str, dict[str, dict]]:
    """What `build_app` makes of every file: file -> deployment -> its options. The artifacts are of the right shape."""
    folder, all_arguments = tmp_path_factory.mktemp("apps"), {}
    for path in APPS:
        (application,) = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text())).applications
        assert application.import_path == "serve_apps.sere:build_app"
        args = application.args
        shape = MoeShape.from_config(AutoConfig.from_pretrained(SHAPE_OF[args["model"]]))
        names = {field: getattr(shape, field) for field in ("num_layers", "hidden_size", "num_experts")}
        artifact = small_artifact(
            layers=tuple(range(shape.num_layers)),
            num_experts_per_token=shape.num_experts_per_token,
            architecture=shape.architecture,
            **names,
        )
        if args["rerouting"].get("policy") == "projection":
            artifact.config.method = "projection"
            for layer in artifact.layers.values():
                layer.coefficient_EE, layer.size_E = layer.similarity_EE.clone(), torch.ones(shape.num_experts)
        artifact.save(folder / path.stem)
        args["rerouting"]["artifact"] = str(folder / path.stem)
        all_arguments[path.name] = args | {"model": str(SHAPE_OF[args["model"]]), "model_id": args["model"]}
    done = cluster.run(
        [sys.executable, "-m", "tests.support.build_apps", json.dumps(all_arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("path", APPS, ids=lambda path: path.name)
def test_application_files_build(path, built):
    """Ray's schema, ours, Ray Serve LLM's and the names of vLLM's arguments; what is asked of the cluster."""
    args = yaml.safe_load(path.read_text())["applications"][0]["args"]
    deployments = built[path.name]
    pools = {"LLMServer:": args, "Prefill:": args["prefill"]} if "prefill" in args else {"LLMServer:": args}
    assert {name.partition(":")[0] for name in deployments} == {
        "SereSettings",
        "SereIngress",
        *(prefix.rstrip(":") for prefix in pools),
    }
    for prefix, pool in pools.items():
        server = next(options for name, options in deployments.items() if name.startswith(prefix))
        tensor, data = pool.get("tensor_parallel_size", 1), pool.get("data_parallel_size", 1)
        assert server["num_replicas"] == pool["num_replicas"] * data
        on_gpus = [bundle.get("GPU", 0) for bundle in server["placement_group_bundles"]]
        assert on_gpus == [1 if "accelerator_type" in pool else 0] * tensor
    assert deployments["SereIngress"]["num_replicas"] == args.get("ingress", {}).get("num_replicas")
    assert args.get("require_api_key", False) == ("accelerator_type" in args)
