"""Splits, memory and times of plans: against sums by hand, and against what vLLM itself accepts."""

import json
import shlex
from dataclasses import replace

import pytest
import torch
import yaml
from typer.testing import CliRunner
from vllm.config.parallel import All2AllBackend
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map
from vllm.utils.argparse_utils import FlexibleArgumentParser

from examples.tiny_moe.data import MODEL
from sere_dist.artifact.recommendation import LayerSetting
from sere_dist.calibration.checkpoint import Checkpoint
from sere_dist.cli import plan as told
from sere_dist.cli.commands import app
from sere_dist.evaluation.rerouters import of_each_rank
from sere_dist.evaluation.synthetic import SyntheticRouter
from sere_dist.forecast import DEVICES, decode_step, prefill_seconds
from sere_dist.serving import (
    BACKENDS,
    OFF,
    RECOMMENDED,
    Architecture,
    Demand,
    ServedModel,
    Site,
    Split,
    all_reduces,
    drawn_routing,
    exchanged,
    splits,
    timed,
    work,
)
from sere_dist.simulation import NETWORKS
from serve_apps.sere import AppConfig
from studies.common import ROOT
from tests.support.artifacts import recommend, small_artifact

SHAPES = ROOT / "benchmarks" / "shapes"
SITE, DEMAND = Site(DEVICES["h100"], NETWORKS["h100-400g"]), Demand(prompt=512, answer=256)
EXPERT = 48 * 3 * 2048 * 768 * 2  # bytes of one expert of Qwen3-30B-A3B, in all layers
WHOLE, WIDE = Split(1, 1, False, None, 8), Split(1, 8, True, "deepep_v2", 1)


def served(name: str, bytes_per_parameter: float = 2.0) -> ServedModel:
    return ServedModel.of(Checkpoint(str(SHAPES / name)).empty_model(), bytes_per_parameter)


@pytest.fixture(scope="module")
def qwen() -> ServedModel:
    return served("qwen3-30b-a3b")


def sizes_of(found: list[Split]) -> set[tuple[int, int, bool]]:
    return {(each.tensor_parallel, each.data_parallel, each.expert_parallel) for each in found}


def test_splits_of_a_node(qwen):
    found, why = splits(8, 1, qwen.architecture)
    sliced, whole = {(size, 1, False) for size in (1, 2, 4, 8)}, {(size, 1, True) for size in (2, 4, 8)}
    assert sizes_of(found) == sliced | whole | {(1, size, True) for size in (2, 4, 8)}
    assert all(each.ranks * each.replicas == 8 for each in found)
    assert {each.backend for each in found if each.data_parallel > 1} == set(BACKENDS)
    assert all("DP with TP" in each for each in why)


def test_a_group_is_within_a_node_or_fills_nodes(qwen):
    found, _ = splits(24, 2, qwen.architecture)
    assert max(each.tensor_parallel for each in found) == 4  # of 12 GPUs of a node; 12 does not divide 32 heads
    assert {each.data_parallel for each in found} == {1, 2, 3, 4, 6, 12, 24}  # 8 GPUs would be on both nodes
    with pytest.raises(ValueError, match="9 GPUs on 2 nodes"):
        splits(9, 2, qwen.architecture)


def test_what_vllm_would_refuse_is_left_out(qwen):
    uneven = replace(qwen.architecture, heads=12, kv_heads=4, expert_width=36)
    found, why = splits(12, 1, uneven)
    assert {each.tensor_parallel for each in found} == {1, 2, 4, 12}
    assert "TP 3 neither divides 4 key-value heads nor is a multiple of them." in why
    assert {each.tensor_parallel for each in splits(12, 1, replace(uneven, is_latent=True))[0]} == {1, 2, 3, 4, 6, 12}
    assert "TP 3 does not divide 32 attention heads." in splits(3, 1, qwen.architecture)[1]
    narrow = splits(8, 1, replace(qwen.architecture, expert_width=4))[0]
    assert (8, 1, True) in sizes_of(narrow) and (8, 1, False) not in sizes_of(narrow)
    assert {each.backend for each in splits(3, 1, qwen.architecture)[0]} == {None, "allgather_reducescatter"}
    few = replace(qwen.architecture, shape=replace(qwen.architecture.shape, num_experts=4))
    assert max(each.data_parallel for each in splits(8, 1, few)[0]) == 4
    huge = replace(qwen.architecture, shape=replace(qwen.architecture.shape, hidden_size=12288))
    assert "deepep_low_latency" not in {each.backend for each in splits(8, 1, huge)[0]}


def test_backends_are_vllms():
    assert set(BACKENDS) <= set(All2AllBackend.__args__)


def test_memory(qwen):
    total = 2 * Checkpoint(str(SHAPES / "qwen3-30b-a3b")).empty_model().num_parameters()
    others = total - 128 * EXPERT
    one, wide, sliced = (qwen.memory(split, 80e9) for split in (WHOLE, WIDE, Split(8, 1, False, None, 1)))
    assert one.weights == pytest.approx(total)
    assert wide.weights == pytest.approx(others + 16 * EXPERT)
    assert sliced.weights == pytest.approx(total / 8)
    assert one.cache == pytest.approx(0.92 * 80e9 - 4e9 - total)
    per_token = 48 * 2 * 4 * 128 * 2
    assert one.tokens == int(one.cache / per_token)
    assert sliced.tokens == int(sliced.cache / (per_token / 4))  # 4 key-value heads on 8 ranks: each has two copies
    assert qwen.memory(WHOLE, 40e9).cache < 0 and qwen.memory(WHOLE, 40e9).tokens == 0


def test_the_fullest_rank_counts(qwen):
    local = [determine_expert_map(3, rank, 128)[0] for rank in range(3)]
    uneven = Split(1, 3, True, "allgather_reducescatter", 1)
    assert qwen.memory(uneven, 80e9).weights - qwen.memory(WIDE, 80e9).weights == pytest.approx(
        (max(local) - 16) * EXPERT
    )


def test_a_latent_cache_is_on_every_rank():
    latent = served("deepseek-v2-lite")
    assert latent.architecture.is_latent
    sliced = latent.memory(Split(4, 1, False, None, 1), 80e9)
    assert sliced.tokens == int(sliced.cache / (27 * (512 + 64) * 2))


def test_one_gpu_takes_what_the_forecast_says(qwen):
    of = work(qwen, WHOLE, drawn_routing(qwen.architecture, None), 4, OFF, SITE)
    step = timed(qwen, WHOLE, of, SITE, DEMAND)
    forecast = decode_step(qwen.cost, SITE.device, 4, step.step.active, 512 + 128)
    prefill = 4 / 256 * prefill_seconds(qwen.cost, SITE.device, 512)
    assert step.exchange == 0
    assert step.seconds == pytest.approx(forecast.seconds + prefill)
    assert timed(qwen, WHOLE, of, SITE, DEMAND._replace(prefill_here=False)).seconds == pytest.approx(forecast.seconds)
    slow = SITE._replace(device=replace(SITE.device, host_seconds=1.0))
    assert timed(qwen, WHOLE, of, slow, DEMAND).seconds == pytest.approx(1 + prefill)


def test_slices_read_a_share_and_add_up(qwen):
    sliced, routing = Split(4, 1, False, None, 2), drawn_routing(qwen.architecture, None)
    one, four = (
        timed(qwen, split, work(qwen, split, routing, 4, OFF, SITE), SITE, DEMAND) for split in (WHOLE, sliced)
    )
    assert four.step.of_rank.experts == pytest.approx(one.step.of_rank.experts / 4)
    assert four.step.of_rank.others == pytest.approx(one.step.of_rank.others / 4)
    sent = 2 * 3 / 4 * 4 * 2048 * 2
    assert four.exchange == pytest.approx(2 * 48 * (12e-6 + sent / (0.6 * 450e9)))
    assert all_reduces(qwen, WHOLE, 4, SITE.network) == 0


def test_whole_experts_wait_for_the_largest_rank(qwen):
    whole, routing = Split(4, 1, True, None, 2), drawn_routing(qwen.architecture, None)
    step = timed(qwen, whole, work(qwen, whole, routing, 4, OFF, SITE), SITE, DEMAND).step
    assert step.largest_rank > step.active / 4
    assert step.of_rank.experts == pytest.approx(step.largest_rank * EXPERT / SITE.device.bandwidth)


def test_what_is_exchanged(qwen):
    routing = drawn_routing(qwen.architecture, None)
    everywhere, per_rank = (
        exchanged(qwen, split, work(qwen, split, routing, 16, OFF, SITE))
        for split in (replace(WIDE, backend="allgather_reducescatter"), WIDE)
    )
    assert everywhere == pytest.approx(7 * 2048 * (2 + 2) * 48)  # to 7 other ranks and back
    assert per_rank < everywhere
    assert served("qwen3-30b-a3b", 1.0).dispatch_bytes == 1
    assert exchanged(qwen, WHOLE, work(qwen, WHOLE, routing, 16, OFF, SITE)) == 0


def test_each_rank_has_a_primary_set_of_its_own(qwen):
    routing = drawn_routing(qwen.architecture, None)
    before, (weights, ids) = routing.routed(4, 2, OFF)[0], routing.routed(4, 2, "S = 1")[0]
    expected = of_each_rank(routing.rerouters["S = 1"], 2)(0, *before, None)
    assert weights.equal(expected[0]) and ids.equal(expected[1])
    assert not ids.equal(before[1])


def test_experts_are_as_popular_as_counted():
    tokens_E = torch.cat([torch.full((8,), 900.0), torch.full((24,), 60.0)])
    router = SyntheticRouter(0.9, 2.0, 0.7)
    bias_E = router.biases(tokens_E, 4, seed=3)
    ids = router.route(1, 4096, 32, 4, torch.Generator().manual_seed(3), bias_E=bias_E)[1]
    used_E = ids.flatten().bincount(minlength=32) / ids.numel()
    assert used_E.tolist() == pytest.approx((tokens_E / tokens_E.sum()).tolist(), rel=0.1)


def tuned_artifact(policy: str = "sere"):
    artifact = small_artifact(num_experts=128, num_experts_per_token=8, num_layers=48, hidden_size=2048)
    for layer in artifact.layers.values():
        layer.tokens_E = torch.arange(1, 129)
    artifact.recommended = recommend(artifact, policy, dict.fromkeys((0, 1), LayerSetting(select_top_k=1)))
    return artifact


def planned(model: ServedModel, goal: told.Goal, artifact=None, gpus: int = 2, site: Site = SITE):
    return told.plans(model, site, gpus, 1, drawn_routing(model.architecture, artifact), DEMAND, goal)


def test_plans_keep_the_goal(qwen):
    found, _ = planned(qwen, told.Goal("throughput", token_ms=12))
    each = [plan.by_setting[OFF] for plan in found]
    assert all(prediction.seconds <= 12e-3 for prediction in each)
    assert all(prediction.seconds_least < prediction.seconds < prediction.seconds_most for prediction in each)
    rates = [prediction.tokens_per_second for prediction in each]
    assert rates == sorted(rates, reverse=True) and len(rates) > 3
    assert rates[0] == pytest.approx(found[0].split.engines * each[0].batch / each[0].seconds)
    assert not planned(qwen, told.Goal("throughput", token_ms=0.5))[0]
    assert any("no batch keeps 0.5 ms" in line for line in planned(qwen, told.Goal("throughput", token_ms=0.5))[1])


def test_requests_fix_the_batch(qwen):
    found, _ = planned(qwen, told.Goal("latency", requests=9))
    assert {plan.by_setting[OFF].batch for plan in found} == {5, 9}  # of two engines, and of one
    seconds = [plan.by_setting[OFF].seconds for plan in found]
    assert seconds == sorted(seconds)
    with pytest.raises(ValueError, match="--objective latency needs --requests"):
        told.Goal("latency")


def test_what_does_not_fit_is_said(qwen):
    small = SITE._replace(device=replace(SITE.device, memory=48e9))
    found, why = planned(qwen, told.Goal("throughput"), site=small)
    assert all(plan.split.ranks == 2 for plan in found)
    assert "2 x one GPU: weights take 61 GB of each GPU." in why
    crowded, why = planned(qwen, told.Goal("latency", requests=10**6))
    assert not crowded and any("too few for its requests" in line for line in why)
    with pytest.raises(ValueError, match="memory"):
        planned(qwen, told.Goal("throughput"), site=SITE._replace(device=DEVICES["2-cpu-cores"]))


def test_a_tuned_artifact_is_planned_with(qwen):
    goal, artifact = told.Goal("latency", requests=16), tuned_artifact()
    found, _ = planned(qwen, goal, artifact)
    best = found[0].best(goal)
    assert best.setting == RECOMMENDED
    assert best.active < found[0].by_setting[OFF].active
    assert best.faster > 1 and best.faster_least <= best.faster <= best.faster_most
    assert "was measured at batch 16: KL divergence 0.0100" in told.quality(artifact, 16)
    assert "tune again with --batch 8" in told.quality(artifact, 8)
    assert "Re-routing is left to tune" in told.quality(None, 8)
    assert planned(qwen, goal)[0][0].best(goal).setting == OFF  # nobody knows what S = 1 costs


def test_the_plan_can_be_deployed(qwen, artifact_path):
    goal = told.Goal("latency", requests=16)
    for artifact in (None, tuned_artifact()):
        for plan in planned(qwen, goal, artifact)[0]:
            arguments = told.application(plan, goal, "some/model", "h100", str(artifact_path))
            lines = yaml.safe_load(told.serve_yaml(arguments, str(artifact_path)))["args"]
            config = AppConfig(**lines)
            assert config.accelerator_type == "H100"
            assert (config.rerouting is not None) == (plan.best(goal).setting == RECOMMENDED)
            flags = shlex.split(shlex.join(told.engine_arguments(arguments)))
            parsed = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(flags)
            assert parsed.tensor_parallel_size == plan.split.tensor_parallel
            assert parsed.data_parallel_size == plan.split.data_parallel
            assert parsed.enable_expert_parallel == plan.split.expert_parallel
            assert parsed.max_num_seqs == plan.best(goal).batch
            if plan.split.backend:
                assert parsed.all2all_backend == plan.split.backend
            assert ("sere" in (parsed.additional_config or {})) == (config.rerouting is not None)


def run(*options: str):
    command = ["plan-serving", "--model", str(MODEL), "--gpus", "2", "--requests", "8", *options]
    return CliRunner().invoke(app, command)


def test_command(artifact_path):
    shown = run("--hardware", "h100", "--artifact", str(artifact_path))
    assert shown.exit_code == 0, shown.output
    for said in ("Left out:", "What this rests on:", "args:", "vllm serve", "left to tune", "tensor_parallel_size:"):
        assert said in shown.output
    found = json.loads(run("--hardware", "h100", "--json", "--objective", "latency").stdout)
    assert found[0]["settings"][0]["setting"] == OFF
    for plan in found:
        assert plan["weights_gb"] > 0
        for each in plan["settings"]:
            least, most = each["ms_per_token_range"]
            assert least <= each["ms_per_token"] <= most
    for option, wrong in (("--hardware", "abacus"), ("--network", "string")):
        refused = run("--hardware", "h100", option, wrong)
        assert refused.exit_code == 2 and wrong in refused.output
    assert "no split fits" in str(run("--hardware", "h100", "--token-ms", "0.001").exception)


def test_architectures_of_families():
    grouped = Checkpoint(str(SHAPES / "deepseek-v2-lite")).config
    assert Architecture.of(grouped).groups == 1
    grouped.n_group, grouped.topk_group = 8, 4
    assert Architecture.of(grouped).groups == 8
    dense = Architecture.of(Checkpoint(str(SHAPES / "qwen3-235b-a22b")).config)
    assert (dense.heads, dense.kv_heads, dense.expert_width, dense.is_latent) == (64, 4, 1536, False)
