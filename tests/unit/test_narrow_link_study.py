"""What the study of a narrow link predicts, and what it makes of its measurements, against sums by hand."""

import pytest
import torch

from sere_dist.evaluation.rerouters import projection_rerouter
from sere_dist.evaluation.traffic import Layout
from sere_dist.method.placement import linear_ranks
from sere_dist.method.records import LayerTables, Settings
from studies import narrow_link as study
from studies.tables import narrow_link_rows

SHAPE = study.Shape(rows_per_rank=10, layers=2, hidden_size=100, top_k=4)
LINKS = (study.Speed(), study.Speed(8e6, 1e-3))
OFF, PRICED = "off", str(study.SETTINGS[-1])


def test_bytes_of_a_step():
    """10 rows of 2 layers visit half a rank each: 10 visits, with 100 + 4 + 4 numbers there and 100 back."""
    assert SHAPE.bytes_of_step(0.5) == 10 * 4 * 208


def test_time_of_a_step():
    assert study.predicted_ms(50.0, 1e9, 11, LINKS[0]) == 50.0
    # 20 kB at 1 MB per second, and 11 exchanges that take 2 ms there and back.
    assert study.predicted_ms(50.0, 20e3, 11, LINKS[1]) == pytest.approx(50 + 20 + 22)


def test_links_and_settings_have_names_of_their_own():
    assert [str(speed) for speed in LINKS] == ["open", "8 Mbit/s, 1 ms"]
    names = [(setting.policy, str(setting)) for setting in study.SETTINGS]
    assert len(set(names)) == len(names) and [name for _, name in names].count(OFF) == 2


def measured(setting, link, number, ms):
    counts = {"wire_bytes": 9000.0, "sent_bytes": 8000.0, "remote_domains": 0.5}
    return {"setting": setting, "link": link, "round": number, "ms": ms, **counts}


def test_summaries_pair_each_round_with_its_own_baseline():
    ranks = []
    for slower in (1.0, 2.0):  # the second rank's clock, or the second round's load
        one = [measured(OFF, link, 1, slower * ms) for link, ms in ((0, 40.0), (1, 90.0))]
        ranks.append(one + [measured(PRICED, link, 1, slower * ms) for link, ms in ((0, 40.0), (1, 60.0))])
    quality = {"kl": 0.01, "kl_error": 0.001, "active_experts": 30.0, "remote_domains": 0.5}
    qualities = {str(setting): quality for setting in study.SETTINGS}
    shown = (study.SETTINGS[0], study.SETTINGS[-1])
    rows = study.summaries([ranks], qualities, LINKS, SHAPE, shown)
    of = {(row["setting"], row["link"]): row for row in rows}
    assert len(rows) == 4
    priced = of[PRICED, "8 Mbit/s, 1 ms"]
    assert priced["ms"] == {"median": 90.0, "min": 60.0, "max": 120.0}
    assert priced["times_faster"] == {"median": 1.5, "min": 1.5, "max": 1.5}
    assert priced["predicted_ms"] == pytest.approx(60 + 8.32 + 2 * 11, rel=1e-3)  # on the open link: 40 and 80
    head, cells = narrow_link_rows(rows)
    assert head[-2:] == ["open", "8 Mbit/s, 1 ms"]
    assert cells[1][0] == PRICED and cells[1][-1] == "90 (60 to 120), predicted 90"


def test_an_exchange_of_nothing_takes_no_time_of_the_rate():
    probe_rows = 1000
    one = [{"probe": 0, "nothing": 1e-3, "much": 5e-3}, {"probe": 1, "nothing": 2e-3, "much": 6e-3}]
    nothing, much = study.probes([[one]], LINKS, probe_rows)
    assert nothing["nothing_ms"]["median"] == 1.0 and much["nothing_ms"]["median"] == 2.0
    assert much["mbit_per_second"]["median"] == pytest.approx(4 * 8 * probe_rows / 4e-3 / 1e6)


def test_each_rank_has_its_own_primary_set_and_its_tokens_at_home():
    random = torch.Generator().manual_seed(0)
    ids = torch.rand(3, 8, 16, generator=random).topk(4, dim=2).indices
    weights = torch.rand(3, 8, 4, generator=random)
    tables = LayerTables(*torch.rand(2, 16, 16, generator=random), torch.rand(16, generator=random))
    ranks_E = linear_ranks(16, study.RANKS)
    setting = study.Setting("projection", Settings(1, expert_price=0.01, traffic_price=0.2))
    found = study.policy_of(setting, {"sere": {0: tables}, "projection": {0: tables}}, {0: ranks_E})
    new_weights, new_ids = found(0, weights, ids, None)
    for rank in range(study.RANKS):
        rows = slice(rank, None, study.RANKS)
        alone = projection_rerouter({0: tables}, setting.numbers, Layout(study.RANKS, {0: ranks_E}, home=rank))
        known = alone(0, weights[:, rows], ids[:, rows], None)
        assert new_weights[:, rows].equal(known[0]) and new_ids[:, rows].equal(known[1])
    away = projection_rerouter({0: tables}, setting.numbers, Layout(study.RANKS, {0: ranks_E}, home=1))
    assert not away(0, weights[:, ::2], ids[:, ::2], None)[1].equal(new_ids[:, ::2])
