"""Time against quality: the widened model, and how policies are compared at one KL divergence."""

import pytest
import torch

from benchmarks.policies import Setting
from examples.tiny_moe.data import MODEL
from examples.tiny_moe.widen import widen
from sere_dist.moe import load_model
from studies import tradeoff
from studies.common import at_kl


def test_widening_changes_no_output(model, tmp_path):
    wide = load_model(str(widen(MODEL, tmp_path / "wide", 64)), "cpu")
    assert wide.config.moe_intermediate_size == 2 * model.config.moe_intermediate_size
    ids = torch.randint(4096, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(wide(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


def test_between_two_settings():
    points = [(0.1, 10.0), (0.001, 30.0), (0.01, 20.0)]
    assert at_kl(points, 0.01) == 20
    assert at_kl(points, 10**-1.5) == pytest.approx(15)
    assert at_kl(points, 0.2) is None


def test_policies_at_the_papers_kl():
    rows = []
    for setting in tradeoff.SETTINGS:
        row = {"batch": 16, "setting": str(setting), "ms_by_round": [100.0, 120.0]}
        if setting.kind != "stock":
            row |= tradeoff.quality_of(setting, 16)
        if setting.kind == "paper":
            row["ms_by_round"] = [60.0, 60.0]
        if setting.kind == "price":
            row["ms_by_round"] = [50.0, 40.0]
        rows.append(row)
    found = {row["policy"]: row for row in tradeoff.compare(rows, 16)}
    assert found["paper"]["times_faster_than_stock"] == {"median": 1.833, "min": 1.667, "max": 2.0}
    assert found["price"]["times_faster_than_paper"] == {"median": 1.35, "min": 1.2, "max": 1.5}


def test_every_setting_has_a_quality():
    for batch in tradeoff.BATCHES:
        for setting in tradeoff.SETTINGS[1:]:
            assert tradeoff.quality_of(setting, batch)["kl"] > 0
    with pytest.raises(KeyError):
        tradeoff.quality_of(Setting("paper", 5), 16)
