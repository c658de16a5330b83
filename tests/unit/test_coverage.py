"""What a calibration says where experts were seen too little."""

import torch

from calibration_jobs.coverage import certainty_line, coverage_warnings, source_warnings
from sere_dist.artifact.layer import LayerStatistics
from sere_dist.artifact.sources import SourceStatistics, services
from sere_dist.calibration.layers import LayerResult
from sere_dist.method.certainty import Certainty


def layer(tokens: list[int] | None, kept: float | None = None, same: float = 0.5, index: int = 3) -> LayerResult:
    similarity_EE = torch.eye(12)
    tokens_E = None if tokens is None else torch.tensor(tokens)
    certainty = None if kept is None else Certainty(0.01, same, kept)
    statistics = LayerStatistics.of(index, "experts", similarity_EE, tokens_E, certainty=certainty)
    return LayerResult(similarity_EE, statistics, tokens_E=tokens_E)


def test_enough():
    assert coverage_warnings(layer([32] * 12, kept=0.9), 64, 32, 0.9) == []
    assert coverage_warnings(layer(None), 64, 32, 0.9) == []


def test_experts_that_few_tokens_reached():
    """The least reached one got 7 of 32 from 64 texts: 64 * 32 / 7 = 292.6."""
    (warning,) = coverage_warnings(layer([32, 7, 31, *[90] * 9]), 64, 32, 0.9)
    assert warning.startswith("layer 3: 2 experts got fewer than 32 tokens: 1 (7), 2 (31); ")
    assert "about 293 such texts (--num-samples)" in warning
    (warning,) = coverage_warnings(layer([32, 7, *[90] * 10]), 64, 32, 0.9)
    assert warning.startswith("layer 3: 1 expert got fewer than 32 tokens: 1 (7); ")


def test_experts_that_no_token_reached():
    (warning,) = coverage_warnings(layer([0] * 10 + [90] * 2), 64, 32, 0.9)
    assert "0 (0), 1 (0)" in warning and "7 (0) and 2 more; no number of such texts is known to suffice" in warning


def test_substitutes_that_depend_on_the_texts():
    (warning,) = coverage_warnings(layer([90] * 12, kept=0.71), 64, 32, 0.9)
    assert "keep 71% of what the best are worth on the other half, less than 90%" in warning
    few, unsure = coverage_warnings(layer([1] * 12, kept=0.71), 64, 32, 0.9)
    assert "fewer than 32 tokens" in few and unsure == warning


def test_all_layers_in_a_line():
    rows = [layer([90] * 12, kept, same).statistics for kept, same in ((0.95, 0.625), (0.98, 0.75))]
    line = certainty_line([*rows, layer(None).statistics])
    assert line is not None and "62% to 75% of a layer's experts" in line and "95% to 98%" in line
    assert certainty_line([layer(None).statistics]) is None


def of_source(layer: int, name: str, *fit: float) -> SourceStatistics:
    names = ("substitute_kept", "own_kept", "same_substitute")
    return SourceStatistics(layer=layer, source=name, tokens=1200, **dict(zip(names, fit, strict=False)))


def test_a_source_that_the_others_outweigh():
    """Chats have noisy texts and lose nothing by it, code differs, and of tools too little is known."""
    rows = [of_source(3, "chats", 0.7, 0.6, 0.5), of_source(3, "code", 0.5, 0.9, 0.2), of_source(3, "tools")]
    rows += [of_source(4, "chats", 0.5, 0.6, 0.7), of_source(4, "code", 0.9, 0.7, 0.4), of_source(4, "tools")]
    chats, code, tools = services(rows)
    assert chats.cells() == ["chats", "1,200", "60%", "60%", "60%", "4: 50% (60%)"]
    assert code.cells() == ["code", "1,200", "70%", "80%", "30%", "3: 50% (90%)"]
    assert tools.cells() == ["tools", "1,200", "-", "-", "-", "-"]
    (warning,) = source_warnings([chats, code, tools], 0.9)
    assert warning.startswith("code: substitutes chosen on all sources keep 70% of what the best are worth there")
    assert "its own texts 80%; give it more weight (--mixture)" in warning
    assert source_warnings([chats, code, tools], 0.87) == []
