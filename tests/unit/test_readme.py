"""The README against the results that it quotes."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_the_table_is_what_the_quality_study_printed():
    rows = json.loads((ROOT / "studies/results/quality-tiny-moe.json").read_text())["field"]
    of = {(row["policy"], row["knob"]): row for row in rows if row["batch"] == 16}
    off, paper, ours = of["off", None], of["paper, frobenius", 2], of["expert price, S = 1", 0.02]
    assert f"| baseline, no re-routing | {off['active_experts']:.1f} | {off['perplexity']:.2f} | 0 |" in README
    for name, row, kl in (("SERE, S = 2", paper, "{:.3f}"), ("**sere_dist**, `expert_price` 0.02", ours, "**{:.3f}**")):
        cells = (name, f"{row['active_experts']:.1f}", f"{row['perplexity']:.2f}", kl.format(row["kl"]))
        assert f"| {' | '.join(cells)} |" in README
    assert f"16 tokens that decode together use {off['active_experts']:.0f} of them" in README


def test_the_speed_is_what_the_benchmark_printed():
    rows = json.loads((ROOT / "benchmarks/results/decode-cpu-small.json").read_text())["eager"]["rows"]
    (row,) = (row for row in rows if (row["batch"], row["setting"]) == (16, "S = 2"))
    assert f"vLLM decoded {row['times_faster']['median']:.2f} times faster" in " ".join(README.split())


def test_it_is_short():
    assert 60 <= len(README.splitlines()) <= 90
