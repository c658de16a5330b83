"""The functions of a calibration against direct computation, and its command as far as that needs no cluster."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaConfig
from typer.testing import Result

from calibration_jobs import calibrate as job
from calibration_jobs.calibrate import CalibrationConfig, add_sensitivities, calibrate
from calibration_jobs.job import RAY_WORKING_DIR, refuse_lost_output
from examples.tiny_moe.data import CALIBRATION, MODEL
from sere_dist.artifact.folder import Artifact
from sere_dist.artifact.layer import LayerStatistics
from sere_dist.calibration.checkpoint import Checkpoint
from sere_dist.calibration.layers import LayerResult, expert_inputs, run_layer, score_layer, text_blocks
from sere_dist.calibration.memory import with_halving
from sere_dist.calibration.sensitivity import Sensitivity
from sere_dist.method.certainty import certainty_of
from sere_dist.method.similarity import expert_projection, expert_similarity, random_similarity, weight_similarity
from sere_dist.method.sources import fits_of_sources
from sere_dist.moe import hooked_experts, routed_experts
from tests.support.commands import invoke
from tests.support.direct import calibration_texts, direct


def run(*options: str) -> Result:
    """Runs the job's command; everything tested this way stops before Ray starts."""
    return invoke(job.main, *options)


def ragged(count: int, lengths: tuple[int, ...]) -> list[list[int]]:
    """Calibration texts of differing lengths, as token ids."""
    ids = calibration_texts(count, max(lengths))
    return [text[: lengths[i % len(lengths)]] for i, text in enumerate(ids)]


@torch.no_grad()
def test_saliency_is_the_mean_size_of_what_an_expert_adds(model, heldout_ids):
    routings = {}
    with hooked_experts(model, lambda layer, routing: routings.update({layer: routing})):
        model(heldout_ids[:1, :20])
    (hidden, ids, weights), (_, experts) = routings[2], routed_experts(model)[2]
    checkpoint = Checkpoint(str(MODEL))
    inputs = dict(expert_inputs(checkpoint, text_blocks([heldout_ids[0, :20].tolist()])))
    found = score_layer(checkpoint, 2, inputs[2], "projection").saliency_E
    sizes: dict[int, list[float]] = {}
    for n, (token_ids, token_weights) in enumerate(zip(ids, weights, strict=True)):
        for expert, weight in zip(token_ids, token_weights, strict=True):
            added = experts(hidden[n : n + 1], expert.view(1, 1), weight.view(1, 1))
            sizes.setdefault(int(expert), []).append(float(added.norm()))
    means = [sum(sizes[expert]) / len(sizes[expert]) if expert in sizes else 0 for expert in range(len(found))]
    assert found.tolist() == pytest.approx(means, rel=1e-4)
    assert 0 in means


@pytest.mark.parametrize("method", ["frobenius", "cosine", pytest.param("cka", marks=pytest.mark.long), "projection"])
def test_streamed_layers_and_padded_blocks_are_exact(model, method):
    """Texts of five lengths, in blocks that pad them; the other side never pads."""
    texts = ragged(20, (32, 9, 25, 32, 2))
    blocks = text_blocks(texts, tokens_a_block=100, groups=4)
    assert len(blocks) > 4 and any(len(set(block.lengths_B)) > 1 for block in blocks)
    expected = direct(model, texts)
    edges = [sum(map(len, texts[: 5 * group])) for group in range(5)]
    checkpoint = Checkpoint(str(MODEL))
    for layer, inputs in expert_inputs(checkpoint, blocks):
        outputs_ENH, weights_NE = expected[layer]
        assert sum(len(block.hidden_states_NH) for block in inputs) == sum(map(len, texts))
        if layer not in (0, 5):
            continue
        result = score_layer(checkpoint, layer, inputs, method, "polynomial", block_tokens=64)
        assert result.tokens_E.tolist() == (weights_NE > 0).sum(dim=0).tolist()
        if method == "projection":
            mean_square = torch.tensor(result.statistics.mean_square)
            found = (result.similarity_EE, result.coefficient_EE, result.size_E, mean_square, result.saliency_E)
            for ours, theirs in zip(found, expert_projection(outputs_ENH, weights_NE), strict=True):
                assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
        else:
            assert result.coefficient_EE is None and result.size_E is None
            theirs = expert_similarity(outputs_ENH, method, "polynomial")
            assert (result.similarity_EE - theirs).abs().max() < 1e-4
        if method == "cka":
            assert result.statistics.similarity_error is None
            continue

        def by(chosen, outputs_ENH=outputs_ENH, weights_NE=weights_NE):
            tokens = torch.cat([torch.arange(edges[group], edges[group + 1]) for group in chosen])
            if method == "projection":
                return expert_projection(outputs_ENH[:, tokens], weights_NE[tokens]).similarity_EE
            return expert_similarity(outputs_ENH[:, tokens], method)

        if method != "projection":  # by which some experts are reached in some of the groups alone
            sure = certainty_of(by, 4)
            assert result.statistics.similarity_error == pytest.approx(sure.similarity_error, rel=1e-3)
            assert result.statistics.same_substitute == pytest.approx(sure.same_substitute, abs=0.02)
            assert result.statistics.substitute_kept == pytest.approx(sure.substitute_kept, abs=1e-3)


def test_what_an_error_costs_weighs_the_sizes():
    """Relative to the mean over layers, whatever the unit of a layer's sizes."""
    results = {}
    for layer, mean_square in ((0, 2.0), (3, 0.5)):
        statistics = LayerStatistics.of(layer, "experts", torch.eye(2), mean_square=mean_square)
        results[layer] = LayerResult(torch.eye(2), statistics, torch.eye(2), torch.tensor([0.5, 1.5]))
    assert results[0].tables.size_E.tolist() == [0.5, 1.5]
    assert add_sensitivities(results, {}) is None
    assert add_sensitivities(results, {0: Sensitivity(0.0, 0.0), 3: Sensitivity(0.0, 0.0)}) is None
    assert results[0].tables.size_E.tolist() == [0.5, 1.5]
    mean = add_sensitivities(results, {0: Sensitivity(3e-4, 3e-5), 3: Sensitivity(4e-4, 1e-5)})
    assert mean == pytest.approx(4e-4)  # of 6e-4 and 2e-4
    assert [results[layer].statistics.sensitivity for layer in (0, 3)] == pytest.approx([1.5, 0.5])
    assert results[0].statistics.sensitivity_error == pytest.approx(0.15)
    assert results[3].tables.size_E.tolist() == pytest.approx([0.25, 0.75])
    assert results[3].size_E.tolist() == [0.5, 1.5], "the file keeps what was measured"
    add_sensitivities(results, {0: Sensitivity(3e-4, 3e-5), 3: Sensitivity(0.0, 0.0)})  # no error of layer 3 shows
    assert [results[layer].statistics.sensitivity for layer in (0, 3)] == [2.0, 0.0]
    assert results[3].statistics.sensitivity_error == 0.0


def test_blocks_hold_each_text_once():
    texts = ragged(7, (12, 3, 30))
    blocks = text_blocks(texts, tokens_a_block=64)
    unpadded = [ids[:n].tolist() for block in blocks for ids, n in zip(block.ids_BL, block.lengths_B, strict=True)]
    assert sorted(unpadded) == sorted(texts)
    assert all(block.ids_BL.size <= 64 for block in blocks)
    assert text_blocks([]) == []


@pytest.mark.parametrize(("count", "groups"), [(20, 8), (8, 8), (7, 6), (3, 2), (1, 1)])
def test_groups_are_runs_of_the_texts(count, groups):
    texts = [[place] * (1 + place % 3) for place in range(count)]
    blocks = text_blocks(texts, groups=8)
    assert [block.group for block in blocks] == list(range(groups))
    members = [sorted(set(block.ids_BL.max(axis=1).tolist())) for block in blocks]
    assert [place for each in members for place in each] == list(range(count))
    sizes = [len(each) for each in members]
    assert max(sizes) - min(sizes) <= 1


def test_groups_have_all_sources():
    """Each source's texts are parted among the groups, and a block has texts of one source."""
    sources = (["chats"] * 3 + ["code"]) * 4 + ["tools"]
    texts = [[place] for place in range(len(sources))]
    blocks = text_blocks(texts, groups=4, sources=sources)
    assert [(block.group, block.source) for block in blocks] == [
        *((group, source) for group in range(4) for source in ("chats", "code")),
        (3, "tools"),
    ]
    members = [block.ids_BL[:, 0].tolist() for block in blocks]
    assert members[:2] == [[0, 1, 2], [3]] and members[-1] == [16]
    assert sorted(place for each in members for place in each) == list(range(17))
    assert {block.group for block in text_blocks(texts[:8], groups=8, sources=sources[:8])} == set(range(6))


@pytest.mark.parametrize("method", ["frobenius", "projection"])
def test_sources_are_compared_in_the_same_pass(model, method):
    """The example model's first layer, on two sources of texts; the other side computes each group's tokens apart."""
    texts, sources = ragged(16, (32, 9)), ["long", "short"] * 8
    outputs_ENH, weights_NE = direct(model, texts)[0]
    ends = np.cumsum([0, *map(len, texts)])
    members = [(group, source) for group in range(4) for source in ("long", "short")]

    def by(chosen):
        those = [members[place] for place in chosen]  # of each group and source, there are two texts
        places = [4 * group + 2 * i + (source == "short") for group, source in those for i in (0, 1)]
        tokens = torch.cat([torch.arange(ends[place], ends[place + 1]) for place in places])
        if method == "projection":
            return expert_projection(outputs_ENH[:, tokens], weights_NE[tokens]).similarity_EE
        return expert_similarity(outputs_ENH[:, tokens], method)

    checkpoint = Checkpoint(str(MODEL))
    layer, inputs = next(expert_inputs(checkpoint, text_blocks(texts, groups=4, sources=sources)))
    result = score_layer(checkpoint, layer, inputs, method)
    assert [(row.layer, row.source, row.tokens) for row in result.sources] == [(0, "long", 256), (0, "short", 72)]
    whole_EE = by(range(8))
    assert (result.similarity_EE - whole_EE).abs().max() < 1e-4
    together = score_layer(checkpoint, layer, [block._replace(source="") for block in inputs], method)
    assert together.sources == [] and together.statistics.similarity_error == pytest.approx(
        result.statistics.similarity_error, rel=1e-5
    )
    if method == "frobenius":  # by projection, some experts are reached in some of the groups alone
        for row, fit in zip(result.sources, fits_of_sources(by, members).values(), strict=True):
            found = (row.substitute_kept, row.own_kept, row.same_substitute)
            assert found == pytest.approx(tuple(fit), abs=0.02)
            assert 0 < row.substitute_kept < 1 and 0 < row.own_kept < 1


def test_an_expert_reached_in_one_group_alone_is_not_sure():
    """The example model on 8 texts of 8 tokens; projection looks at the tokens of an expert."""
    texts = ragged(8, (8,))
    *_, (layer, inputs) = expert_inputs(Checkpoint(str(MODEL)), text_blocks(texts, groups=8))
    few = score_layer(Checkpoint(str(MODEL)), layer, inputs, "projection").statistics
    assert few.same_substitute < 0.5 and few.substitute_kept < 0.7
    assert 0.01 < few.similarity_error < 1


def test_methods_without_data(model):
    checkpoint, experts = Checkpoint(str(MODEL)), model.model.layers[2].mlp.experts
    weights = score_layer(checkpoint, 2, [], "weights")
    assert torch.allclose(weights.similarity_EE, weight_similarity(experts.parameters()), atol=1e-6)
    assert weights.tokens_E is None and weights.statistics.tokens_per_expert_min is None
    random = [score_layer(checkpoint, layer, [], "random", seed=3).similarity_EE for layer in (1, 2)]
    assert torch.equal(random[1], random_similarity(64, 3 + 2)) and not torch.equal(*random)


def test_memory_that_runs_out_halves_the_block():
    tried = []

    def compute(size: int) -> str:
        tried.append(size)
        if size > 3:
            torch.empty(2**60)  # the allocator itself refuses
        return "done"

    assert with_halving(100, compute, "a test") == ("done", 3)
    assert tried == [100, 50, 25, 12, 6, 3]
    with pytest.raises(MemoryError, match=r"a test does not fit .* --memory-per-task .*--device cpu"):
        with_halving(4, lambda _size: torch.empty(2**60), "a test")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # another error is not taken for it
        with_halving(4, lambda _size: torch.ones(2, 3) @ torch.ones(2, 3), "a test")


def test_a_forward_pass_takes_fewer_texts_when_memory_runs_out(model):
    """The first two times that a layer is called, its memory runs out: the states are the same."""
    checkpoint, blocks = Checkpoint(str(MODEL)), text_blocks(ragged(6, (16,)))
    ((whole, inputs),) = run_layer(checkpoint, 0, blocks, None)
    failures = iter([True, True])

    def fail(*_arguments) -> None:
        if next(failures, False):
            torch.empty(2**60)  # the allocator itself refuses

    class Cramped(Checkpoint):
        def empty_model(self):
            model = super().empty_model()
            model.model.layers[0].register_forward_pre_hook(fail)
            return model

    ((pieces, pieces_inputs),) = run_layer(Cramped(str(MODEL)), 0, blocks, None)
    assert next(failures, None) is None
    assert np.allclose(whole, pieces, atol=1e-5)
    assert np.array_equal(inputs.top_k_index_NK, pieces_inputs.top_k_index_NK)


def test_a_dry_run_prints_the_plan_and_starts_nothing(tmp_path, monkeypatch):
    def init(address: str | None, **_options) -> None:
        assert address == "auto", "Ray would start a cluster"
        raise ConnectionError("no cluster is up")  # nor is one of another test's: this process would end with it

    monkeypatch.setattr("ray.init", init)
    done = run("--model", str(MODEL), "--output", str(tmp_path / "out"), "--dry-run", "--num-samples", "100")
    assert done.exit_code == 0, done.output
    assert "6, of which 6 MoE: 64 experts, 8 per token" in done.output and "12,800" in done.output
    assert "(no cluster)" in done.output
    assert os.listdir(tmp_path) == []


def write_parquet(path: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_a_model_without_experts(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    done = run("--model", str(tmp_path), "--dataset", str(CALIBRATION), "--output", str(tmp_path / "out"))
    assert done.exit_code == 1
    assert "error: llama has no routed experts" in done.output


def test_a_model_that_is_not_there(tmp_path):
    nowhere = tmp_path / "nowhere"
    done = run("--model", str(nowhere), "--dataset", str(CALIBRATION), "--output", str(tmp_path / "out"))
    assert done.exit_code == 1
    assert "error: " in done.output and str(nowhere) in done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "o", "--dataset", "d"], "--model: Field required"),
        (["--model", "m", "--output", "o", "--dataset", "d", "--method", "frob"], "--method: Input should be"),
        (["--model", "m", "--output", "o", "--dataset", "d", "--num-samples", "0"], "--num-samples: Input should be"),
        (["--model", "m", "--output", "s3://bucket/out"], "s3://bucket/out is an address, this is a path"),
    ],
)
def test_bad_options_are_named(options, message):
    done = run(*options)
    assert done.exit_code == 1 and message in done.output


def test_an_output_that_is_there_stops_the_job_before_any_work(artifact_path, tmp_path):
    done = run("--model", str(MODEL), "--dataset", str(CALIBRATION), "--output", str(artifact_path))
    assert done.exit_code == 1 and "--overwrite" in done.output
    Artifact.load(artifact_path)


def test_an_unknown_key_in_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text("modle: typo\n")
    done = run("--config", str(tmp_path / "c.yaml"), "--model", "m", "--output", "o", "--dataset", "d")
    assert done.exit_code == 1 and "--modle: Extra inputs are not permitted" in done.output


def test_a_failing_calibration_writes_nothing(tmp_path):
    short = write_parquet(tmp_path / "short.parquet", text=["a few words"])
    with pytest.raises(ValueError, match="no usable text"):
        calibrate(CalibrationConfig(model=str(MODEL), output=tmp_path / "out", dataset=str(short)))
    assert os.listdir(tmp_path) == ["short.parquet"]


def test_a_relative_output_inside_a_jobs_working_directory(tmp_path, monkeypatch):
    working = tmp_path / RAY_WORKING_DIR / "package"
    working.mkdir(parents=True)
    monkeypatch.chdir(working)
    with pytest.raises(ValueError, match="absolute path"):
        refuse_lost_output(Path("out"))
    refuse_lost_output(tmp_path / "out")
