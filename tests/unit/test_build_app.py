"""The builder of the Serve application: what it hands on, and what it refuses before Ray is asked."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from examples.tiny_moe.data import MODEL
from sere_dist.config import ReroutingConfig
from serve_apps.sere import ENGINE_REQUESTS, AppConfig, build_app, llm_config, requests_of_engines

CONTROL = {"prices": [0, 0.01], "waiting": 4}


def arguments(artifact, **changes) -> dict:
    return {"model": str(MODEL), "rerouting": {"artifact": str(artifact), "select_top_k": 2, **changes}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"select_top_k": -1}, "select_top_k\n.*greater than or equal to 0"),
        ({"select_top_k": 0}, "with select_top_k 0 prices alone decide what runs: set expert_price or balance_price"),
        ({"select_top_k": 9}, r"select_top_k \(9\) must be at most the model's experts per token \(8\)"),
        ({"threshold": 1.5}, "threshold\n"),
        ({"artifact": "nowhere"}, "no artifact at .*/nowhere: "),
        ({"artifact": "s3://bucket/artifact"}, "s3://bucket/artifact is an address, this is a path: mount the bucket"),
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
        ({"environment": {"SERE_API_KEY": "sesame"}}, "environment.SERE_API_KEY: secrets don't belong in a config"),
        ({"engine": {"api_key": "sesame"}}, "engine.api_key: secrets"),
        ({"deployment": {"ray_actor_options": {"runtime_env": {"env_vars": {"HF_TOKEN": "sesame"}}}}}, "HF_TOKEN: sec"),
        ({"ingress": {"ray_actor_options": {"runtime_env": {"env_vars": {"SERE_ADMIN_TOKEN": "sesame"}}}}}, "TOKEN: s"),
        ({"environment": {"SERE_API_KEY_FILE": "/a/file"}}, "the ingress reads it"),
        ({"autoscaling": {"min_replicas": 1}}, "autoscaling has no target_ongoing_requests"),
        ({"environment": {"VLLM_PLUGINS": ""}}, "leaves sere_dist out"),
        ({"control": {"prices": [0, 0.01]}}, "control\n.*the controller has no objective"),
        ({"control": CONTROL}, "control changes expert_price: set policy: projection in rerouting"),
        ({"control": CONTROL, "rerouting": None}, "set rerouting too"),
        ({"opt_out_by": [], "rerouting": None}, "opt_out_by says who may opt out of re-routing: set rerouting too"),
        ({"opt_out_by": ["key"]}, "opt_out_by.0\n.*'header' or 'body'"),
        ({"accelerator_type": "H1000"}, "Unsupported accelerator type: H1000"),
        ({"data_parallel_size": 2}, "needs expert_parallel: true"),
        ({"data_parallel_size": 2, "tensor_parallel_size": 2, "expert_parallel": True}, "set one of them to 1"),
    ],
)
def test_bad_arguments_stop_the_deployment(artifact_path, changes, message):
    with pytest.raises(ValueError, match=message) as refused:
        build_app({**arguments(artifact_path), **changes})
    assert "sesame" not in str(refused.value)


def test_a_budget_that_nobody_could_watch_is_refused(projection_path):
    rerouting = {"policy": "projection", "select_top_k": 1}
    with pytest.raises(ValueError, match="max_kl needs an artifact that was tuned"):
        build_app(arguments(projection_path, **rerouting) | {"control": CONTROL | {"max_kl": 0.05}})


def test_a_plugin_that_would_not_load_is_refused(artifact_path, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "something_else")
    with pytest.raises(ValueError, match="leaves sere_dist out"):
        build_app(arguments(artifact_path))


def test_arguments_reach_ray_and_vllm():
    """Those of an application that is not re-routed."""
    translated = llm_config(
        AppConfig(
            model=str(MODEL),
            autoscaling={"min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 4},
            deployment={"max_ongoing_requests": 7},
            engine={"max_model_len": 64},
            environment={"A": "b"},
            tensor_parallel_size=2,
        )
    )
    assert translated.model_id == "model"
    assert translated.runtime_env == {"env_vars": {"A": "b"}}
    assert translated.engine_kwargs["max_num_queued_reqs"] == 4096
    assert translated.deployment_config["graceful_shutdown_timeout_s"] == 600  # longer than any answer
    scaling = translated.deployment_config["autoscaling_config"]
    assert scaling == {"min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 4}
    assert translated.deployment_config["max_ongoing_requests"] == 7
    assert translated.engine_kwargs["max_model_len"] == 64 and translated.engine_kwargs["tensor_parallel_size"] == 2
    assert translated.experimental_configs == {"stream_batching_interval_ms": 0}
    assert translated.placement_group_config == {"bundles": [{"CPU": 1}] * 2}


def test_a_bound_of_ours_gives_way():
    translated = llm_config(AppConfig(model=str(MODEL), engine={"max_num_queued_reqs": 7}))
    assert translated.engine_kwargs["max_num_queued_reqs"] == 7


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({}, ENGINE_REQUESTS),
        ({"num_replicas": 3, "engine": {"max_num_queued_reqs": 16}}, 48),
        ({"data_parallel_size": 2, "expert_parallel": True, "engine": {"max_num_queued_reqs": 16}}, 32),
        ({"autoscaling": {"max_replicas": 5, "target_ongoing_requests": 8}}, 5 * ENGINE_REQUESTS),
        ({"engine": {"max_num_queued_reqs": None}}, None),
    ],
)
def test_an_ingress_takes_what_the_engines_take(changes, most):
    assert requests_of_engines(AppConfig.model_validate({"model": str(MODEL), **changes})) == most


def test_what_an_artifact_recommends_reaches_vllm(artifact_path):
    rerouting = {"artifact": artifact_path, "policy": "recommended", "min_rows": 4}
    translated = llm_config(AppConfig(model=str(MODEL), rerouting=rerouting))
    sere = ReroutingConfig.model_validate(translated.engine_kwargs["additional_config"]["sere"])
    assert (sere.policy, sere.select_top_k, sere.min_rows) == ("recommended", None, 4)


TRANSFER = {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}


def test_a_prefill_pool_is_like_the_application_but_for_rerouting(artifact_path):
    pools = {"engine": TRANSFER, "prefill": {"engine": TRANSFER | {"max_model_len": 64}, "tensor_parallel_size": 2}}
    config = AppConfig(**arguments(artifact_path) | pools)
    assert config.prefill is not None
    decode, prefill = llm_config(config), llm_config(config, config.prefill)
    assert decode.model_id == prefill.model_id and decode.engine_kwargs["tensor_parallel_size"] == 1
    assert prefill.engine_kwargs["max_model_len"] == 64 and prefill.engine_kwargs["tensor_parallel_size"] == 2
    assert "sere" in decode.engine_kwargs["additional_config"] and "additional_config" not in prefill.engine_kwargs
    # Where Ray Serve LLM's own builder puts it: pools on one node must not listen at the same port.
    assert decode.experimental_configs["NIXL_SIDE_CHANNEL_PORT_BASE"] == 22000
    assert "NIXL_SIDE_CHANNEL_PORT_BASE" not in prefill.experimental_configs


@pytest.mark.parametrize("without, place", [("engine", "engine"), ("prefill", "prefill.engine")])
def test_a_prefill_pool_needs_a_way_for_keys_and_values(artifact_path, without, place):
    pools = {"engine": TRANSFER, "prefill": {"engine": TRANSFER}}
    pools[without] = {}
    with pytest.raises(ValueError, match=f"{place} has no kv_transfer_config"):
        build_app(arguments(artifact_path) | pools)


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


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
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
