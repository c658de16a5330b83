"""The builder of the Serve application: what it takes, what it refuses, and every configuration file of ours."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from examples import demo
from sere_dist.config import ReroutingConfig
from sere_dist.moe import MoeShape
from serve_apps.sere import AppConfig, build_app, llm_config
from tests.conftest import MODEL, small_artifact

APPS = sorted((demo.ROOT / "serve_apps").glob("*.yaml"))
SHAPES = demo.ROOT / "benchmarks" / "shapes"
# The published shape of each model that a file names.
SHAPE_OF = {
    "examples/tiny_moe/model": MODEL,
    "Qwen/Qwen1.5-MoE-A2.7B-Chat": SHAPES / "qwen1.5-moe-a2.7b",
    "deepseek-ai/DeepSeek-V2-Lite-Chat": SHAPES / "deepseek-v2-lite",
    "Qwen/Qwen3-30B-A3B": SHAPES / "qwen3-30b-a3b",
}


def arguments(artifact, **changes) -> dict:
    return {"model": str(MODEL), "rerouting": {"artifact": str(artifact), "select_top_k": 2, **changes}}


@pytest.fixture(scope="module")
def built(cluster, tmp_path_factory) -> dict[str, dict[str, dict]]:
    """What `build_app` makes of every file: file -> deployment -> its options. The artifacts are of the right shape."""
    from transformers import AutoConfig

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
        cwd=demo.ROOT,
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
    server = next(options for name, options in deployments.items() if name.startswith("LLMServer:"))
    tensor, data = args.get("tensor_parallel_size", 1), args.get("data_parallel_size", 1)
    assert set(deployments) == {"SereSettings", "SereIngress", *(name for name in deployments if ":" in name)}
    assert server["num_replicas"] == args["num_replicas"] * data
    on_gpus = [bundle.get("GPU", 0) for bundle in server["placement_group_bundles"]]
    assert on_gpus == [1 if "accelerator_type" in args else 0] * tensor
    assert deployments["SereIngress"]["num_replicas"] == args.get("ingress", {}).get("num_replicas")
    assert args.get("require_api_key", False) == ("accelerator_type" in args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"select_top_k": 0}, "select_top_k\n.*greater than or equal to 1"),
        ({"select_top_k": 9}, r"select_top_k \(9\) must be between 1 and the model's experts per token \(8\)"),
        ({"threshold": 1.5}, "threshold\n"),
        ({"artifact": "nowhere"}, "no artifact at nowhere"),
        ({"select_top_k": None, "policy": "recommended"}, "needs an artifact that was tuned"),
        ({"policy": "projection"}, "needs an artifact of method projection"),
    ],
)
def test_bad_settings_stop_the_deployment(artifact_path, changes, message):
    with pytest.raises(ValueError, match=message):
        build_app(arguments(**{"artifact": artifact_path, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor_paralel_size": 2}, "tensor_paralel_size\n"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size\n"),
        ({"model": "nobody/no-such-model"}, "no configuration of 'nobody/no-such-model' could be read"),
        ({"engine": {"tensor_parallel_size": 2}}, "engine has tensor_parallel_size: set the application's own"),
        ({"engine": {"max_modle_len": 512}}, "Unknown engine argument: max_modle_len"),
        ({"engine": {"additional_config": {"sere": {"select_top_k": 99}}}}, "set by `rerouting`"),
        ({"deployment": {"num_replicas": 2}}, "deployment has num_replicas: set the application's own num_replicas"),
        ({"num_replicas": 2, "autoscaling": {"min_replicas": 1}}, "num_replicas and autoscaling exclude each other"),
        ({"environment": {"SERE_API_KEY": "sesame"}}, "secrets don't belong in a configuration file"),
        ({"environment": {"VLLM_PLUGINS": ""}}, "leaves sere_dist out"),
        ({"accelerator_type": "H1000"}, "Unsupported accelerator type: H1000"),
        ({"data_parallel_size": 2}, "needs expert_parallel: true"),
        ({"data_parallel_size": 2, "tensor_parallel_size": 2, "expert_parallel": True}, "set one of them to 1"),
    ],
)
def test_bad_arguments_stop_the_deployment(artifact_path, changes, message):
    with pytest.raises(ValueError, match=message) as refused:
        build_app({**arguments(artifact_path), **changes})
    assert "sesame" not in str(refused.value)


def test_a_plugin_that_would_not_load_is_refused(artifact_path, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "something_else")
    with pytest.raises(ValueError, match="leaves sere_dist out"):
        build_app(arguments(artifact_path))


def test_arguments_reach_ray_and_vllm():
    """Those of an application that is not re-routed."""
    translated = llm_config(
        AppConfig(
            model=str(MODEL),
            autoscaling={"min_replicas": 1, "max_replicas": 3},
            deployment={"max_ongoing_requests": 7},
            engine={"max_model_len": 64},
            environment={"A": "b"},
            tensor_parallel_size=2,
        )
    )
    assert translated.model_id == "model" and translated.runtime_env == {"env_vars": {"A": "b"}}
    assert translated.deployment_config["autoscaling_config"] == {"min_replicas": 1, "max_replicas": 3}
    assert translated.deployment_config["max_ongoing_requests"] == 7
    assert translated.engine_kwargs["max_model_len"] == 64 and translated.engine_kwargs["tensor_parallel_size"] == 2
    assert translated.experimental_configs == {"stream_batching_interval_ms": 0}
    assert translated.placement_group_config == {"bundles": [{"CPU": 1}] * 2}


def test_what_an_artifact_recommends_reaches_vllm(artifact_path):
    rerouting = {"artifact": artifact_path, "policy": "recommended", "min_rows": 4}
    translated = llm_config(AppConfig(model=str(MODEL), rerouting=rerouting))
    sere = ReroutingConfig.model_validate(translated.engine_kwargs["additional_config"]["sere"])
    assert (sere.policy, sere.select_top_k, sere.min_rows) == ("recommended", None, 4)


values = st.one_of(
    st.sampled_from((0, 1, 2, -1, 1.5, "", "H100", "A10", True, None, {}, [])),
    st.dictionaries(
        st.sampled_from(("max_model_len", "num_replicas", "min_replicas", "sere", "a")), st.integers(), max_size=2
    ),
    st.dictionaries(
        st.text(max_size=5), st.recursive(st.none() | st.text(max_size=5) | st.floats(), st.lists, max_leaves=3)
    ),
)
near_valid = st.dictionaries(st.sampled_from((*AppConfig.model_fields, "unknown")), values, max_size=4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(args=near_valid, whole=st.booleans(), rerouting=st.booleans())
def test_whatever_is_given_is_refused_or_valid(artifact_path, args, whole, rerouting):
    """Arguments near to valid ones lead to a ValueError that says something, or to what Ray Serve LLM takes."""
    base = arguments(artifact_path) if rerouting else {"model": str(MODEL)}
    try:
        translated = llm_config(AppConfig.model_validate(args if whole else base | args))
    except ValueError as error:
        assert str(error)
    else:
        assert translated.model_id and translated.engine_kwargs["tensor_parallel_size"] >= 1


def test_unknown_settings_are_refused(artifact_path):
    with pytest.raises(ValidationError, match="select_topk\n"):
        build_app(arguments(artifact_path, select_topk=2))
