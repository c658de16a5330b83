"""What `sere-dist forecast` predicts, against sums by hand and against committed measurements."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from examples.tiny_moe.data import MODEL
from sere_dist.artifact.recommendation import LayerSetting
from sere_dist.calibration.checkpoint import Checkpoint
from sere_dist.cli import forecast as told
from sere_dist.cli.commands import app
from sere_dist.forecast import DEVICES, ModelCost, decode_step, prefill_seconds, uniform_shares, union
from tests.support.artifacts import recommend, small_artifact

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ROOT / "benchmarks" / "shapes"
LOAD = told.Load(prompt=512, answer=256)


def cost_of(name: str) -> ModelCost:
    return ModelCost.of(Checkpoint(str(SHAPES / name)).empty_model(), 2.0)


def test_a_model_costs_what_its_parameters_take():
    cost = cost_of("cpu-small")
    hidden, layers, vocabulary, expert = 1024, 12, 32000, 3 * 1024 * 512
    assert cost.expert_bytes == 2 * layers * expert
    assert cost.expert_operations == 2 * layers * expert
    attention = hidden * 64 * (16 + 2 * 4) + 64 * 16 * hidden + 2 * 64  # with the norms of queries and keys
    others = layers * (attention + 2 * hidden + 64 * hidden) + hidden + vocabulary * hidden
    assert cost.other_operations == cost.other_bytes == 2 * others  # the input embedding is looked up, not read
    assert cost.cache_bytes == 2 * layers * 2 * 4 * 64
    assert cost.on_ranks(2).expert_bytes == cost.expert_bytes / 2


def test_tied_embeddings_are_read_once_and_latent_caches_are_small():
    model = Checkpoint(str(SHAPES / "smollm2-moe")).empty_model()
    cost = ModelCost.of(model, 2.0)
    assert 64 * cost.expert_bytes + cost.other_bytes == pytest.approx(2 * model.num_parameters())
    assert cost_of("deepseek-v2-lite").cache_bytes == 2 * 27 * (512 + 64)


def test_union():
    shares_E = torch.tensor([0.5, 0.25, 1.0])
    assert union(shares_E, 1) == pytest.approx(1.75)
    assert union(shares_E, 2) == pytest.approx(0.75 + 0.4375 + 1)
    rows, shape = 16, cost_of("cpu-small").shape
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.rand(rows, 64, generator=generator).topk(8).indices.unique().numel() for _ in range(400)]
    assert union(uniform_shares(shape), rows) == pytest.approx(sum(drawn) / len(drawn), rel=0.01)


def test_a_step_is_read_and_computed():
    cost, cpu, gpu = cost_of("cpu-small"), DEVICES["2-cpu-cores"], DEVICES["h100"]
    step = decode_step(cost, cpu, 4, 20.0, 100)
    read, computed = 20 * cost.expert_bytes / cpu.bandwidth, 4 * 8 * cost.expert_operations / cpu.speed
    assert step.experts == pytest.approx(read + computed)
    assert step.seconds == pytest.approx(step.experts + step.others + step.attention + step.waiting)
    assert decode_step(cost, gpu, 4, 20.0, 100).experts == pytest.approx(20 * cost.expert_bytes / gpu.bandwidth)
    slow = decode_step(cost, replace(gpu, host_seconds=1.0), 4, 20.0, 100)
    assert slow.is_host_bound and slow.seconds == 1.0
    assert prefill_seconds(cost, gpu, 20) == pytest.approx(2 * prefill_seconds(cost, gpu, 10))


def test_measured_steps_are_within_a_fifth():
    """The shape that the processor's rates were fitted to, with the active experts that were measured."""
    rows = json.loads((ROOT / "benchmarks/results/decode-cpu-small.json").read_text())["eager"]["rows"]
    cost, cpu = cost_of("cpu-small"), DEVICES["2-cpu-cores"]
    kept = {"S = 1", "S = 2", "S = 4", "S = 8 (off)"}
    errors = []
    for row in (row for row in rows if row["setting"] in kept):
        predicted = decode_step(cost, cpu, row["batch"], row["active_after"], 38).seconds
        errors.append(abs(math.log(predicted / (row["ms_per_token"]["median"] / 1e3))))
    assert len(errors) == 20
    assert max(errors) < math.log(1.2)


def test_popular_experts_make_a_smaller_union():
    artifact, cost = small_artifact(), cost_of("cpu-small")
    shape = replace(cost.shape, num_experts=4, num_experts_per_token=2)
    cost = replace(cost, shape=shape)
    for layer in artifact.layers.values():
        layer.tokens_E = torch.tensor([97, 97, 3, 3])
    known, unknown = (told.active_experts(cost, 8, each)["off"] for each in (artifact, None))
    assert 2 < known < unknown < 4
    assert known == pytest.approx(2 * (1 - 0.03**8) + 2 * (1 - 0.97**8))


def test_what_was_tuned_is_forecast_too():
    artifact = small_artifact()
    artifact.recommended = recommend(artifact, "sere", dict.fromkeys((0, 1), LayerSetting(select_top_k=1)))
    cost = cost_of("cpu-small")
    cost = replace(cost, shape=replace(cost.shape, num_experts=4, num_experts_per_token=2))
    active = told.active_experts(cost, 16, artifact)
    assert active["recommended"] == pytest.approx(active["off"] * 2 / 4)  # as its evidence has it at batch 16
    assert "recommended" not in told.active_experts(cost, 17, artifact)


def verdict(cost: ModelCost, device, batches: list[int], load: told.Load = LOAD) -> str:
    return told.verdict(told.forecast(cost, device, load, batches, None), cost, device, load, None)


def test_the_verdict_says_why_there_is_no_gain():
    cost, gpu = cost_of("qwen3-30b-a3b"), DEVICES["h200"]
    assert "Batch 16: up to" in verdict(cost, gpu, [16])
    assert "The host takes 25.0 ms" in verdict(cost, replace(gpu, host_seconds=0.025), [16])
    assert "Even at S = 1 the batch runs" in verdict(cost, gpu, [512])
    tiny = replace(cost, expert_bytes=cost.expert_bytes / 100)
    assert "gaps between kernels" in verdict(tiny, replace(gpu, host_seconds=0), [1])
    prefill = verdict(cost, gpu, [16], told.Load(prompt=8000, answer=8))
    assert "its time is prefill" in prefill


def test_flat_similarities_are_pointed_out():
    artifact, cost, gpu = small_artifact(method="projection"), cost_of("qwen3-30b-a3b"), DEVICES["h200"]
    for layer in artifact.layers.values():
        layer.similarity_EE = torch.eye(4) + 0.01 * (1 - torch.eye(4))
    assert told.explained(artifact) == pytest.approx(0.01)
    found = told.forecast(cost, gpu, LOAD, [16], None)
    assert "explains 1.0%" in told.verdict(found, cost, gpu, LOAD, artifact)


def run(*options: str):
    return CliRunner().invoke(app, ["forecast", "--model", str(MODEL), *options])


def test_command():
    found = json.loads(run("--hardware", "h100", "--batches", "1,16", "--json").output)
    assert [(each["batch"], each["setting"]) for each in found] == [
        (batch, setting) for batch in (1, 16) for setting in ("off", "S = 4", "S = 2", "S = 1")
    ]
    assert all(each["least"] <= each["times_faster"] <= each["most"] for each in found)
    halved = json.loads(run("--hardware", "h100", "--batches", "1,16", "--json", "--bits", "8").output)
    assert halved[0]["ms_per_step"] <= found[0]["ms_per_step"]
    table = run("--hardware", "h100", "--batches", "16")
    assert table.exit_code == 0 and "Batch 16:" in table.output
    unknown = run("--hardware", "abacus")
    assert unknown.exit_code == 2 and all(name in unknown.output for name in DEVICES)
    assert str(run("--hardware", "h100", "--batches", "many").exception).startswith("error: ")
