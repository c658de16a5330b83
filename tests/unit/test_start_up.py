"""What the plugin checks in vLLM's front end, before an engine or a worker starts."""

import copy
import logging
import pickle
from types import SimpleNamespace

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from examples.tiny_moe.data import DRAFT, MODEL
from sere_dist.config import ReroutingConfig
from sere_dist.environment import ALLOW_UNTESTED_VLLM
from sere_dist.vllm_plugin import configure as plugin
from sere_dist.vllm_plugin import scheduler, shadow
from sere_dist.vllm_plugin.engine_settings import settings_of
from tests.support.artifacts import small_artifact

TOP_K = 8


DRAFTS_ITSELF = {"method": "draft_model", "model": str(MODEL), "num_speculative_tokens": 2}
DRAFTS_DENSE = DRAFTS_ITSELF | {"model": str(DRAFT)}


def configure(sere: dict, **arguments) -> VllmConfig:
    """Has vLLM make up the engine's configuration, as every engine does first."""
    return EngineArgs(str(MODEL), additional_config={"sere": sere}, **arguments).create_engine_config()


@pytest.fixture
def caplog_vllm(caplog, monkeypatch):
    """What vLLM's loggers say: they hand nothing up to the root."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    return caplog


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"select_top_k": 0}, "with select_top_k 0 prices alone decide what runs: set expert_price or balance_price"),
        ({"select_top_k": TOP_K + 1}, r"select_top_k \(9\) must be at most the model's experts per token \(8\)"),
        ({"select_top_k": 2, "threshold": 2.0}, "threshold\n"),
        ({"select_top_k": 2, "select_topk": 3}, "select_topk\n.*Extra inputs"),
        ({"select_top_k": 2, "artifact": "nowhere"}, "no artifact at .*nowhere"),
        ({"select_top_k": 2, "policy": "projection"}, "artifact of method projection, .* has frobenius: calibrate"),
        ({}, "select_top_k is missing; only policy: recommended brings its own"),
        (
            {"policy": "recommended"},
            "recommended needs an artifact that was tuned, .* was not: run python -m calibration_jobs.tune",
        ),
        ({"policy": "recommended", "select_top_k": 2}, "recommended leaves no choice of select_top_k"),
        ({"select_top_k": 2, "traffic_price": 0.01}, r"traffic_price \(0.01\) needs policy: projection"),
        ({"select_top_k": 2, "balance_price": 0.01}, r"balance_price \(0.01\) needs policy: projection"),
        ({"select_top_k": 2, "expert_price": 0.1}, r"expert_price \(0.1\) needs policy: projection"),
        ({"select_top_k": 2, "shadow_share": 1.1}, "shadow_share\n.*less than or equal to 1"),
    ],
)
def test_bad_settings_stop_the_start(artifact_path, settings, message):
    with pytest.raises(ValueError, match=message):
        configure({"artifact": str(artifact_path), **settings})


def test_an_artifact_of_another_model_stops_the_start(tmp_path):
    small_artifact().save(tmp_path / "other")
    with pytest.raises(ValueError, match=r"calibrated for nobody/small-moe.*num_experts: artifact 4, model 64"):
        configure({"artifact": str(tmp_path / "other"), "select_top_k": 2})


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"data_parallel_size": 2}, "enable_expert_parallel=True"),
        ({"data_parallel_size": 2, "enable_expert_parallel": True}, "enforce_eager=True"),
        (
            {"data_parallel_size": 2, "tensor_parallel_size": 2, "enable_expert_parallel": True},
            "tensor_parallel_size=1",
        ),
        ({"kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill=False"),
        ({"enable_lora": True}, "remove enable_lora"),
        ({"runner": "pooling"}, "serve it to generate"),
    ],
)
def test_what_is_not_rerouted_yet_is_refused(artifact_path, parallel, message):
    sere = {"artifact": str(artifact_path), "select_top_k": 2}
    with pytest.raises(ValueError, match=message):
        configure(sere, **parallel)


@pytest.mark.parametrize(
    ("variable", "value", "arguments", "message"),
    [
        ("VLLM_BATCH_INVARIANT", "1", {}, "unset VLLM_BATCH_INVARIANT"),
        (
            "VLLM_USE_RAY_V2_EXECUTOR_BACKEND",
            "0",
            {"distributed_executor_backend": "ray"},
            "unset VLLM_USE_RAY_V2_EXECUTOR_BACKEND",
        ),
    ],
)
def test_switches_of_vllm_that_rule_rerouting_out_are_refused(
    artifact_path, monkeypatch, variable, value, arguments, message
):
    sere = {"artifact": str(artifact_path), "select_top_k": 2}
    configure(sere)
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        configure(sere, **arguments)


def test_elastic_expert_parallelism_is_refused(artifact_path):
    """vLLM itself refuses it on CPUs, so the configuration is changed afterwards."""
    config = configure({"artifact": str(artifact_path), "select_top_k": 2})
    config.parallel_config.enable_elastic_ep = True
    advice = [advice for is_on, advice in plugin.unsupported_features(config) if is_on]
    assert advice == ["elastic expert parallelism: set enable_elastic_ep=False"]


def test_another_number_does_not_compile_the_model_anew(artifact_path, projection_path):
    """vLLM's key of its compile cache has `additional_config` in it."""

    def key(path, **sere):
        return configure({"artifact": str(path), **sere}).compute_hash()

    plain = key(artifact_path, select_top_k=2)
    assert plain == key(artifact_path, select_top_k=1, threshold=0.5, min_rows=3, enabled=False)
    assert plain == key(projection_path, select_top_k=2), "the policy is the same"
    priced = key(projection_path, select_top_k=2, policy="projection")
    assert priced == key(projection_path, select_top_k=3, policy="projection", expert_price=0.1)
    assert priced != plain, "another policy is other code"


def test_settings_reach_the_workers(artifact_path):
    """The configuration is pickled on its way to them, and an engine's arguments may be used again."""
    sere = {"artifact": str(artifact_path), "select_top_k": 2, "threshold": 0.25}
    arguments = EngineArgs(str(MODEL), additional_config={"sere": sere, "other": 1})
    for _ in range(2):
        additional = pickle.loads(pickle.dumps(arguments.create_engine_config())).additional_config
        assert settings_of(additional["sere"]) == ReroutingConfig.model_validate(sere).resolved()
        assert additional["other"] == 1
    assert arguments.additional_config == {"sere": sere, "other": 1}


@pytest.mark.parametrize(
    ("sere", "parallel", "message"),
    [
        ({"traffic_price": 0.01}, {}, "set enable_expert_parallel"),
        ({"traffic_price": 0.01}, {"tensor_parallel_size": 2, "enable_expert_parallel": True}, "set it to 0"),
        ({}, {"data_parallel_size": 2, "enable_expert_parallel": True}, "cpu_dispatch: all_to_all"),
        ({"cpu_dispatch": "all_to_all"}, {"data_parallel_size": 2, "enable_expert_parallel": True}, None),
        ({}, {"tensor_parallel_size": 2, "enable_expert_parallel": True}, None),
    ],
)
def test_the_start_warns_where_no_traffic_can_be_saved(projection_path, caplog_vllm, sere, parallel, message):
    sere = {"artifact": str(projection_path), "select_top_k": 2, "policy": "projection", **sere}
    configure(sere, enforce_eager=True, **parallel)
    warnings = [record.getMessage() for record in caplog_vllm.records if "no bytes" in record.getMessage()]
    assert len(warnings) == (message is not None)
    assert message is None or message in warnings[0]


@pytest.mark.parametrize(
    ("sere", "parallel", "message"),
    [
        ({}, {}, "set enable_expert_parallel"),
        ({}, {"data_parallel_size": 2, "enable_expert_parallel": True}, "primary_scope: group"),
        ({"primary_scope": "group"}, {"data_parallel_size": 2, "enable_expert_parallel": True}, None),
        ({}, {"tensor_parallel_size": 2, "enable_expert_parallel": True}, None),
    ],
)
def test_the_start_warns_where_nothing_is_balanced(projection_path, caplog_vllm, sere, parallel, message):
    sere = {"artifact": str(projection_path), "select_top_k": 1, "policy": "projection", "balance_price": 0.1, **sere}
    configure(sere, enforce_eager=True, **parallel)
    warnings = [found for record in caplog_vllm.records if "balance_price" in (found := record.getMessage())]
    assert len(warnings) == (message is not None)
    assert message is None or message in warnings[0]


@pytest.mark.parametrize(("select_top_k", "warns"), [(1, True), (2, False), (TOP_K, False)])
def test_the_start_warns_of_lost_quality(artifact_path, caplog_vllm, select_top_k, warns):
    sere = {"artifact": str(artifact_path), "select_top_k": select_top_k}
    configure(sere)
    warnings = [record for record in caplog_vllm.records if "raise select_top_k" in record.getMessage()]
    assert len(warnings) == warns


@pytest.mark.parametrize("local", ["", "+cu129", "+cpu"])
def test_wheels_for_another_cuda_are_the_same_release(artifact_path, monkeypatch, local):
    monkeypatch.setattr(plugin.vllm, "__version__", f"{plugin.TESTED_VLLM[-1]}{local}")
    configure({"artifact": str(artifact_path), "select_top_k": 2})


def test_an_untested_vllm_is_refused(artifact_path, monkeypatch):
    arguments = EngineArgs(str(MODEL), additional_config={"sere": {"artifact": str(artifact_path), "select_top_k": 2}})
    monkeypatch.setattr(plugin, "TESTED_VLLM", ("0.0.1",))
    with pytest.raises(ValueError, match=f"tested with vLLM 0.0.1.*{ALLOW_UNTESTED_VLLM}=1"):
        arguments.create_engine_config()
    monkeypatch.setenv(ALLOW_UNTESTED_VLLM, "1")
    arguments.create_engine_config()
    monkeypatch.setenv(ALLOW_UNTESTED_VLLM, "yes")
    with pytest.raises(ValueError, match="must be 0 or 1, not 'yes'"):
        arguments.create_engine_config()


def test_a_cache_of_prompts_alone(artifact_path):
    sere = {"artifact": str(artifact_path), "select_top_k": 2}
    plain = configure(sere).scheduler_config
    assert plain.scheduler_cls is None
    exact = {**sere, "exact_cache": True}
    assert configure(exact).scheduler_config.get_scheduler_cls() is scheduler.PromptCacheScheduler
    plain.async_scheduling = True
    assert plugin.scheduler_of(plain).endswith(".AsyncPromptCacheScheduler")
    with pytest.raises(ValueError, match="exact_cache works with vLLM's own scheduler"):
        configure(exact, scheduler_cls="vllm.v1.core.sched.scheduler.Scheduler")
    with pytest.raises(ValueError, match="set rows: decode"):
        configure({**exact, "rows": "all"})


@pytest.mark.parametrize(
    ("speculation", "cure"),
    [
        ({"method": "ngram"}, None),
        ({"method": "mtp"}, None),
        ({"method": "dspark", "enable_adaptive_verification": True}, "set enable_adaptive_verification to false"),
        ({"method": "extract_hidden_states"}, "remove speculative_config"),
    ],
)
def test_which_speculative_decoding_is_refused(artifact_path, speculation, cure):
    """vLLM checks most methods against a draft model, so what it would have made of them is put there afterwards."""
    config = configure({"artifact": str(artifact_path), "select_top_k": 2})
    config.speculative_config = SimpleNamespace(**speculation)
    advice = [advice for is_on, advice in plugin.unsupported_features(config) if is_on]
    assert [cure in each for each in advice] == ([] if cure is None else [True])


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ({"tensor_parallel_size": 2, "enable_expert_parallel": True}, None),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size above 1"),
        (
            {"data_parallel_size": 2, "enable_expert_parallel": True, "enforce_eager": True},
            "data_parallel_size above 1",
        ),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative_config"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "kv_transfer_config, which may send",
        ),
    ],
)
def test_what_can_not_run_a_step_twice_is_refused(artifact_path, feature, message):
    sere = {"artifact": str(artifact_path), "select_top_k": 2}
    configure(sere, **copy.deepcopy(feature))  # vLLM writes into it
    if message is None:
        configure({**sere, "shadow_share": 0.0}, **feature)
        return
    with pytest.raises(ValueError, match=f"shadow_share does not work with {message}"):
        configure({**sere, "shadow_share": 0.0}, **feature)


@pytest.mark.parametrize(
    ("switch", "message"),
    [
        ({"has_inner_state": True}, "recurrent state"),
        ({"is_hybrid": True}, "recurrent state"),
        ({"enable_eplb": True}, "enable_eplb"),
        ({"use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER=0 chooses V1"),
    ],
)
def test_models_and_runners_that_can_not_run_a_step_twice(switch, message):
    """None of which this machine has."""
    off = dict.fromkeys(("has_inner_state", "is_hybrid", "enable_eplb", "use_v2_model_runner"), False)
    every = SimpleNamespace(
        **off, data_parallel_size=1, pipeline_parallel_size=1, speculative_config=None, kv_transfer_config=None
    )
    every.parallel_config = every.model_config = every
    assert not any(is_on for is_on, _what in shadow.unsupported_features(every))
    vars(every).update(switch)
    (what,) = [what for is_on, what in shadow.unsupported_features(every) if is_on]
    assert message in what


def test_a_draft_models_experts_have_settings_of_their_own(artifact_path):
    sere = {"artifact": str(artifact_path), "select_top_k": 2}
    config = configure(sere | {"draft": sere | {"select_top_k": 3}}, **speculative(DRAFTS_ITSELF))
    own = settings_of(pickle.loads(pickle.dumps(config)).additional_config["sere"]).draft
    assert own is not None and (own.select_top_k, own.artifact) == (3, str(artifact_path.resolve()))
    alone = configure(sere, **speculative(DRAFTS_ITSELF))
    assert config.compute_hash() != alone.compute_hash(), "a draft model that is re-routed is other code"


@pytest.mark.parametrize(
    ("drafts", "draft", "message"),
    [
        (None, {}, "set method to draft_model in speculative_config, or remove 'draft'"),
        ({"method": "ngram", "num_speculative_tokens": 2}, {}, "set method to draft_model"),
        (DRAFTS_DENSE, {}, "qwen3 has no routed experts"),
        (DRAFTS_ITSELF, {"artifact": "nowhere"}, "no artifact at .*nowhere"),
        (DRAFTS_ITSELF, {"select_top_k": TOP_K + 1}, r"select_top_k \(9\) must be at most the model's"),
        (DRAFTS_ITSELF, {"select_top_k": None}, "draft\n.*select_top_k is missing"),
        (DRAFTS_ITSELF, {"policy": "projection"}, "artifact of method projection"),
        (DRAFTS_ITSELF, {"min_rows": 2}, "draft.min_rows\n.*Extra inputs"),
    ],
)
def test_settings_that_are_not_for_what_drafts_stop_the_start(artifact_path, drafts, draft, message):
    own = {"artifact": str(artifact_path), "select_top_k": 2}
    with pytest.raises(ValueError, match=message):
        configure(own | {"draft": own | draft}, **speculative(drafts))


def speculative(config: dict | None) -> dict:
    """The engine's argument: vLLM writes into the dictionary that it is given."""
    return {} if config is None else {"speculative_config": dict(config)}
