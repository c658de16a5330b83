"""The pages quote what the JSON files have: tables as they are, and the sentences that a reader remembers."""

import re

import pytest

from sere_dist.provenance import rounded
from studies.common import ENGINES, RESULTS, ROOT
from studies.tables import MAIN, MARKED, NOTHING, PAGES, PRICED, TABLES, beside_rivals, field_rows, load, written

RESULTS_PAGE, LOG, DESIGN, SCALE = (page.read_text() for page in PAGES)
PROSE = " ".join(RESULTS_PAGE.split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_json(page):
    assert page.read_text() == written(page.read_text()), "python -m studies.tables"


def test_every_table_stands_on_a_page():
    assert sorted(found[2] for page in (RESULTS_PAGE, LOG, DESIGN, SCALE) for found in MARKED.finditer(page)) == sorted(
        TABLES
    )


def test_files_that_the_pages_name():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if not target.startswith("http") and target != "method.md":
                assert (page.parent / target).exists(), target


def test_ours_against_the_papers_policy():
    ours = field_rows()[16, PRICED, 0.02]
    assert f"{ours['beside']['paper, frobenius']['ratio']:.2f} times the KL divergence of the paper's policy" in PROSE


def test_no_price_carries_over():
    kl = {
        (name, row["knob"]): f"{row['kl']:.3f}"
        for name in ("tiny-moe", "smollm2-moe")
        for row in load(RESULTS / f"quality-{name}.json")["field"]
        if row["batch"] == 16 and row["policy"] == PRICED
    }
    low, high = ([kl[name, price] for name in ("tiny-moe", "smollm2-moe")] for price in (0.005, 0.02))
    method = " ".join((ROOT / "docs/method.md").read_text().split())
    said = "`expert_price: 0.005` costs {} nats per token on the example model and {} on SmolLM2-MoE"
    assert said.format(*low) in method
    assert "`expert_price: 0.02` costs {} and {}".format(*high) in method


def test_every_factor_is_below_1():
    factors = [beside["ratio"] for row in beside_rivals() for beside in row["beside"].values()]
    assert len(factors) > 200 and max(factors) < 1


def test_batch_128():
    rows = [row for row in load(RESULTS / "batch-128/quality-tiny-moe.json")["field"] if row["policy"] == PRICED]
    ours = next(row for row in rows if row["knob"] == 0.02)
    assert f"it runs {ours['active_experts']:.1f}, at a KL divergence of {ours['kl']:.4f}" in PROSE
    said = []
    for rival in ("paper, frobenius", "OEA", "XShare, warm-up 1", "projection"):
        factors = [row["beside"][rival]["ratio"] for row in rows if row["kl"] >= NOTHING and rival in row["beside"]]
        said.append(f"{min(factors):.2f} to {max(factors):.2f}")
    assert (
        "{} times SERE's KL divergence, {} times OEA's, {} times XShare's, and {} times that of S alone".format(*said)
        in PROSE
    )


def test_a_router_of_deepseek_v3s_kind():
    report = load(RESULTS / "quality-tiny-grouped.json")
    beside = [each for row in beside_rivals("tiny-grouped") for each in row["beside"].items()]
    above = [(name, found) for name, found in beside if found["ratio"] > 1.005]
    assert [name for name, _ in above] == ["projection", "dropping"]
    for _, one in above:
        assert f"one point is at {one['ratio']:.2f} ± {one['ratio_error']:.2f}" in PROSE
        assert one["ratio"] - 1 < one["ratio_error"]
    random = {row["knob"]: row for row in report["beside_random"] if row["policy"] == "paper, frobenius"}
    said = [f"{random[s]['ratio']:.2f} ± {random[s]['ratio_error']:.2f} times" for s in (1, 2)]
    assert f"SERE has {said[0]} the KL divergence of random substitutes at S = 1, and {said[1]} at S = 2" in PROSE


def test_against_the_papers_policy_on_all_models():
    said = []
    for example in ("tiny-moe", "smollm2-moe", "tiny-grouped"):
        beside = [
            row["beside"] for row in field_rows(example).values() if (row["policy"], row["batch"]) == (PRICED, 16)
        ]
        factors = [each["paper, frobenius"]["ratio"] for each in beside if "paper, frobenius" in each]
        said.append(f"{min(factors):.2f} to {max(factors):.2f}")
    assert "it has {} times SERE's KL divergence on one model, and {} and {} times on two others".format(*said) in PROSE


def test_what_a_traffic_price_saves():
    goals = {(goal["baseline"], goal["placement"]): goal for goal in load(RESULTS / "traffic.json")["goals"]}
    for baseline, said in (
        ("paper", ("`traffic_price: {}`, tokens visit {} fewer remote ranks", "{} fewer. Against dropping")),
        ("dropping", ("`traffic_price: {}` makes them visit {} fewer", "with that placement {} fewer")),
    ):
        linear, placed = (goals[baseline, place] for place in ("linear", "placed"))
        assert linear["price"] == placed["price"]
        assert said[0].format(linear["price"], f"{linear['fewer_remote_domains']:.0%}") in PROSE
        assert said[1].format(f"{placed['fewer_remote_domains']:.0%}") in PROSE


def test_real_engines():
    two, four = (load(RESULTS / name)["rows"] for name in ENGINES)

    def of(rows: list, turn: str, scope: str = "rank") -> dict:
        return next(row for row in rows if (row["turn"], row["primary_scope"]) == (turn, scope))

    def saved(turn: str) -> list[str]:
        sent = [[of(rows, each)["bytes_per_token_and_layer"] for each in (turn, "off")] for rows in (two, four)]
        return [f"{1 - less / more:.0%}" for less, more in sent]

    off = [of(rows, "off") for rows in (two, four)]
    visits = [f"{row['remote_domains']:.1f}" for row in off]
    sent = [f"{row['bytes_per_token_and_layer']:,.0f}" for row in off]
    assert f"a token visits {visits[0]} of one other rank and {visits[1]} of three" in PROSE
    assert f"four engines send {sent[1]} bytes per token and layer instead of {sent[0]}" in PROSE
    ours, papers = saved("price 0.05"), saved("paper's")
    assert "saves {} of the bytes with two engines and {} with four".format(*ours) in PROSE
    assert "and the paper's policy {} and {}".format(*papers) in PROSE
    counts = ("bytes_per_token_and_layer", "remote_slots", "active_experts_on_the_largest_rank")
    same = [row for row in four if row["turn"] == "off"]
    assert len(same) == 4 and all(row[name] == same[0][name] for row in same for name in counts)
    times = [row["ms_per_step"] for row in same]
    least, most = min(each["min"] for each in times), max(each["max"] for each in times)
    assert f"took {least:.0f} to {most:.0f} ms" in PROSE
    beside = [row for row in load(RESULTS / "simulation.json")["validation"] if row["what"].endswith("engines")]
    assert all(abs(row["error"]) < 0.01 for row in beside if "decode step" not in row["what"]) and len(beside) == 12
    steps = [row["measured"] / row["simulated"] for row in beside if "decode step" in row["what"]]
    assert 3.5 < steps[0] < 4 and f"{steps[1]:.0f} times: their steps" in " ".join(SCALE.split())


def test_survival():
    found = load(ROOT / "tests/soak/results/survival.json")["survival"]
    sent, answered = sum(found["sent"].values()), sum(found["answered"].values())
    left, failed = sum(found["left"].values()), found["failed"]
    assert f"Of {sent:,} requests in {found['seconds']:,.0f} s, {answered:,} were answered, {left} were left" in PROSE
    assert f"{failed} failed, and none was lost" in PROSE
    assert found["lost"] == 0 and all(found["checks"].values())
    long = found["answered_in_seconds"]["long"]
    assert f"take {long['min']:.0f} to {long['max']:.0f} s" in PROSE
    without_failures = {event["name"] for event in found["events"]} - {row["after"] for row in found["why"]}
    killed = ("the settings' keeper killed", "Serve's controller killed", "an ingress killed")
    assert without_failures == {"deployed again", "a node drained", *killed}


def test_sensitivity():
    found = load(RESULTS / "sensitivity-tiny-moe.json")
    of = {(row["batch"], row["active_experts"], row["policy"]): row for row in found["rows"] if "ratio" in row}
    ours = [row["ratio"] for (_, _, policy), row in of.items() if policy == "first order"]
    assert max(ours) <= 1.005
    assert f"save {1 - max(ours):.0%} to {1 - min(ours):.0%} of the KL divergence".replace("%", "", 1) in PROSE
    routed = [row["ratio"] for (_, _, policy), row in of.items() if policy == "routed"]
    assert sum(ratio <= 1 for ratio in routed) == 1
    seconds = found["seconds"]
    assert f"It took {seconds['measured']:.1f} s and the estimate {seconds['first order']:.1f} s" in PROSE
    times = [row["kl"] / row["predicted"] for row in found["predictions"]]
    assert f"is {min(times):.1f} to {max(times):.1f} times this sum" in PROSE


def test_the_estimate_on_unlike_text():
    rows = load(RESULTS / "sensitivity-tiny-moe.json")["unlike"]
    for kind in {row["kind"] for row in rows}:
        of_kind = [row for row in rows if row["kind"] == kind]
        for name in ("estimated", "kl"):  # the file has them by rising prices
            assert [row[name] for row in of_kind] == sorted(row[name] for row in of_kind)
    times = [row["estimated"] / row["kl"] for row in rows]
    assert f"It is {min(times):.2f} to {max(times):.2f} times the measured KL divergence" in PROSE


def test_forecasts_against_measurements():
    errors = load(RESULTS / "forecast.json")["errors"]
    assert f"within {max(found['speed-up, largest'] for found in errors.values()) - 1:.0%} at all" in PROSE
    times = [found["time, median"] - 1 for found in errors.values()]
    assert f"{min(times):.0%} to {max(times):.0%} too long in the median".replace("%", "", 1) in PROSE
    too_short = [
        row for row in load(RESULTS / "forecast.json")["rows"] if row["ms_predicted"] < row["ms_per_token"]["median"]
    ]
    assert f"All but {len(too_short)} of the times are predicted too long" in PROSE


def test_the_choice_of_what_runs():
    found = load(RESULTS / "selection-tiny-moe.json")
    sets = ("in order", "threshold", "one at a time", "greedy")
    times = [row["beside_exact"] for row in found["choices"] if row["choice"] in sets]
    assert max(times) <= 1.0015 and "all of these are the exact choice but for a tenth of a percent" in PROSE
    free = [row["ratio"] for row in found["at_equal_experts"] if row["policy"] == "greedy, free" and "ratio" in row]
    assert min(free) > 0.98 and "does not confirm that it would be better to leave it out" in PROSE


def test_overload():
    found = load(ROOT / "tests/soak/results/overload.json")["overload"]
    took, refused = found["answered_in_seconds"], found["refused_in_seconds"]
    capacity, asked = (found["requests_per_second"][name] for name in ("capacity", "asked"))
    assert all(found["checks"].values()) and found["requests"].keys() == {"200", "503"}
    assert f"answers {capacity:.1f} requests per second. Asked for {asked:.0f} per second for ten minutes" in PROSE
    answered, told = (found["requests"][status] for status in ("200", "503"))
    assert f"it answered {answered:,} and refused {told:,}" in PROSE
    admitted = (
        f"{took['overloaded']['median']:.2f} s in the median, and {took['at capacity']['median']:.2f} s at capacity"
    )
    assert admitted in PROSE
    assert f"within {refused['median']:.2f} s in the median" in PROSE


def test_a_head_that_dies():
    found = load(ROOT / "tests/soak/results/head.json")["head"]
    without, after = found["requests"]["without a head"], found["requests"]["after"]
    assert all(found["checks"].values()) and found["failures"] == []
    assert f"In the 60 s without a head {without['answered']} requests were answered" in PROSE
    assert f"each within {without['seconds']['max']:.1f} s, and none failed" in PROSE
    assert f"whole {found['seconds_until_whole']:.0f} s later" in PROSE
    assert f"the slowest took {after['seconds']['max']:.1f} s" in PROSE


def test_a_rank_that_dies():
    found = load(ROOT / "tests/soak/results/group.json")["group"]
    events, failed = found["events"], [event["failed"] for event in found["events"]]
    assert all(found["checks"].values()) and sum(failed) == found["requests"] - found["answered"]
    said = f"Of {found['requests']} requests {sum(failed)} failed, {failed[0]}, {failed[1]} and {failed[2]}: those"
    assert said in PROSE
    latest = max(event["failed_after_seconds"]["max"] for event in events if event["failed"])
    assert f"with status 503, within {latest:.1f} s" in PROSE
    first, second, third = (event["answered_again_after_seconds"] for event in events)
    assert f"answers again {first:.0f} s and {second:.0f} s after the engines died" in PROSE
    assert f"{third:.0f} s after the host did, {events[2]['of_these_with_room']:.0f} s after it was back" in PROSE


def test_speed_under_speculative_decoding():
    rows = load(RESULTS / "speculation_speed.json")["rows"]
    found = {(row["batch"], row["drafted"], row["rerouting"]): row for row in rows}

    def times_faster(batch: int, drafted: int, than: str = "off") -> str:
        ours = found.get((batch, drafted, "by chance"), found[batch, drafted, "all rows alike"])
        speeds = [row["tokens_per_second"]["median"] for row in (ours, found[batch, drafted, than])]
        return f"{speeds[0] / speeds[1]:.2f}"

    said = "it decodes {} times faster without drafts, {} times with one drafted token, and {} times with four"
    assert said.format(*(times_faster(16, drafted) for drafted in (0, 1, 4))) in PROSE
    assert "At batch 4 these are {}, {} and {}".format(*(times_faster(4, drafted) for drafted in (0, 1, 4))) in PROSE
    beside = [times_faster(16, drafted, "all rows alike") for drafted in (1, 2, 3, 4)]
    fewer = [
        1 - found[16, drafted, "by chance"]["active_experts"] / found[16, drafted, "all rows alike"]["active_experts"]
        for drafted in (1, 2, 3, 4)
    ]
    assert (
        f"Rows weighted by acceptance ran {min(fewer):.0%} to {max(fewer):.0%} fewer experts".replace("%", "", 1)
        in PROSE
    )
    assert f"were {min(beside)} to {max(beside)} times as fast" in PROSE


def test_what_one_request_tells_of_another():
    """The table says what was found, and its four rows are all that there is."""
    found = load(RESULTS / "side_channel.json")
    closed = [each for each in found["found"] if "off" in each["policy"] or "attacker" in each["policy"]]
    closed += [each for each in found["found"] if "victim" in each["policy"] and not each["others"]]
    open_ = [each for each in found["found"] if each["policy"].startswith("S = ") and "opts" not in each["policy"]]
    assert all((each["bits"], each["identified"]) == (0, rounded(1 / found["victims"])) for each in closed)
    assert all((each["bits"], each["identified"]) == (6, 1) for each in open_ if not each["others"])
    blurred = [each["identified"] for each in open_ if each["others"]]
    assert f"| {min(blurred):.0%} to {max(blurred):.0%} |" in PROSE and len(closed) + len(open_) == 11


def test_which_requests_decode_together():
    report = load(RESULTS / "scheduling-tiny-moe.json")
    found, rows = report["verdict"], [row for row in report["rows"] if row["batch"] == 16 and row["rerouted"]]
    saved = {(row["rule"], row["replicas"], row["window"]): row["time_saved_h200"] for row in rows}
    assert found["is_worth_it"] and found["time_saved"] == saved["by prompt", 8, None]
    four, two = (saved["by prompt", replicas, None] for replicas in (4, 2))
    best = f"shortens the step by {found['time_saved']:.1%} on an H200, with 8 replicas"
    assert f"{best}; it is {four:.1%} with 4 and {two:.1%} with 2" in PROSE
    on_cpus = max(row["time_saved_2-cpu-cores"] for row in rows if row["rule"] == "by prompt")
    assert f"On 2 CPU cores the best is {on_cpus:.1%}" in PROSE
    even = max(time for (rule, *_), time in saved.items() if rule == "by prompt, even loads")
    assert f"Where loads are even at any time, the best is {even:.1%}" in PROSE
    eight, many = (saved["by prompt", 1, window] for window in (8, 32))
    assert f"With 8 to choose from the step is {eight:.1%} shorter. With 32 it is {many:.1%} shorter" in PROSE
    assert max(row["passes_most"] for row in rows if row["window"] == 32) == 64


def test_time_at_equal_quality():
    found = load(RESULTS / "tradeoff.json")
    (ours,) = (row for row in found["at_equal_kl"] if (row["batch"], row["policy"]) == (16, "price"))
    medians = (ours[f"times_faster_than_{other}"]["median"] for other in ("paper", "stock"))
    assert "the medians are {:.2f} and {:.2f}".format(*medians) in PROSE
    assert f"take {found['share_of_experts']['median']:.0%} of a stock step at batch 16" in PROSE
    assert f"only {found['share_of_reading']['16']:.0%} of the step follows" in PROSE


def test_placements_beside_eplb():
    found = load(RESULTS / "placement.json")
    rows = {(row["ranks"], row["nodes"], row["redundant"], row["map"]): row for row in found["rows"]}
    ours, theirs = rows[8, 2, 0, "ours"], rows[8, 2, 0, "EPLB"]
    visits, loads, steps = (
        [f"{row[name]:.2f}" for row in (ours, theirs)]
        for name in ("ranks_of_a_token", "largest_load", "largest_load_of_a_step")
    )
    assert f"tokens visit {visits[0]} of 8 ranks on two nodes, and {visits[1]} under EPLB" in PROSE
    assert f"carries {loads[0]} times the mean instead of {loads[1]}" in PROSE
    assert f"carries {steps[0]} times the mean, and {steps[1]} under EPLB" in PROSE
    for (*case, name), row in rows.items():
        if name == "ours, as even as it gets":
            eplb = rows[*case, "EPLB"]
            assert row["largest_load"] < 1.02 * eplb["largest_load"]
            assert row["ranks_of_a_token"] < eplb["ranks_of_a_token"]
    assert f"took {found['time']['seconds']:.1f} s on one core" in PROSE


def test_the_goal_of_groups_of_ranks():
    """Who reaches a fifth of the paper's step, beside what the page says of every policy."""
    page, found = " ".join(SCALE.split()), load(RESULTS / "simulation.json")
    rows = [row for row in found["savings"] if row["where"] == MAIN]
    safe, other = "balance price, S = 1", "balance price, S = 0"

    def saved(policy: str, ranks: int, keep: int) -> list[float]:
        here = [row for row in rows if (row["ranks"], row["S"]) == (ranks, keep)]
        return sorted(row["saved"].get(policy, [1 - row["off_ms"] / row["paper_ms"]])[0] for row in here)

    def beside_baseline(policy: str, ranks: int, keeps: tuple[int, ...] = (1, 2, 4)) -> list[float]:
        here = [row for row in rows if row["ranks"] == ranks and row["S"] in keeps and policy in row["saved"]]
        return sorted(1 - row["paper_ms"] * (1 - row["saved"][policy][0]) / row["off_ms"] for row in here)

    longer = [row["paper_ms"] / row["off_ms"] - 1 for row in rows]
    assert f"its step is {min(longer):.0%} to {max(longer):.0%} longer".replace("%", "", 1) in page
    prices = [abs(share) for ranks in (16, 32) for share in beside_baseline("expert price, S = 1", ranks)]
    assert f"the step is within {max(prices):.0%} of the baseline's" in page
    assert f"the step is the baseline's, but for {max(beside_baseline(safe, 32)):.1%}" in page
    few = beside_baseline(safe, 16)
    assert f"it is {few[0]:.0%} to {few[-1]:.0%} shorter".replace("%", "", 1) in page

    def between(found: list[float]) -> str:
        return f"{min(found):.0%} to {max(found):.0%}".replace("%", "", 1)

    of = {keep: [*saved(other, 16, keep), *saved(other, 32, keep)] for keep in (1, 2)}
    two, one = between(of[2]), between(of[1])
    assert f"takes {two} off the paper's step at the KL divergence of its S = 2, and {one} at" in page
    beside = [[*beside_baseline(other, 16, (keep,)), *beside_baseline(other, 32, (keep,))] for keep in (2, 1)]
    assert f"Beside the baseline that is {' and '.join(map(between, beside))}." in page
    on_32 = {keep: "{:.0%} and {:.0%}".format(*saved(other, 32, keep)).replace("%", "", 1) for keep in (1, 2, 4)}
    assert f"S = 1 ({on_32[1]}), and missed at S = 2 ({on_32[2]}) and S = 4 ({on_32[4]})" in page
    assert min(saved(other, 32, 1)) >= 0.2 > max(saved(other, 32, 2))
    assert beside_baseline("expert price, S = 1", 32)[-1] < 0.005, "it gains something itself"

    large = {
        (row["model"], row["ranks"], row["rows_per_rank"]): row["saved"].get(other, [0])[0]
        for row in found["synthetic_savings"]
        if row["where"] == MAIN and row["ranks"] >= 32 and row["S"] == (4 if row["model"] == "Kimi-K3" else 2)
    }
    reached = sorted(place for place, share in large.items() if share >= 0.2)
    assert reached == [(model, *place) for model in ("Kimi-K2", "Kimi-K3") for place in ((32, 1), (32, 8), (64, 1))]
    deepseek, qwen = ([large[model, 32, rows] for rows in (1, 8)] for model in ("DeepSeek-V3", "Qwen3-235B-A22B"))
    assert f"DeepSeek-V3 on 32 ranks saves {between(deepseek)}, and Qwen3-235B-A22B {between(qwen)}." in page
    most = max(share for place, share in large.items() if place[1] == 320)
    assert f"nothing saves more than {most:.0%}" in page


def test_a_narrow_link():
    page = " ".join(SCALE.split())
    found = load(RESULTS / "narrow-link.json")
    links = list(dict.fromkeys(row["link"] for row in found["rows"]))
    of = {(row["setting"], links.index(row["link"])): row for row in found["rows"]}

    def faster(setting: str) -> list[str]:
        return [f"{of[setting, link]['times_faster']['median']:.2f}" for link in (1, 2, 3)]

    high, low, papers = (
        "expert_price 0.005, traffic_price 0.05",
        "expert_price 0.005, traffic_price 0.01",
        "SERE, S = 2",
    )
    sent = [f"{of[setting, 0]['sent_bytes'] / 1e3:.0f}" for setting in (high, "off")]
    at_80, at_20, delayed = faster(high)
    assert f"sends {sent[0]} kB instead of {sent[1]}" in page
    assert f"{at_80} times as fast at 80 Mbit/s and {at_20} times at 20 Mbit/s" in page
    assert f"at a KL divergence of {of[high, 0]['kl']:.4f}. The paper's policy" in page
    assert f"has {of[papers, 0]['kl']:.4f}, and is {' and '.join(faster(papers)[:2])} times as fast" in page
    assert f"is {of[low, 0]['kl']:.4f}, and the step is {' and '.join(faster(low)[:2])} times as fast" in page
    assert f"{at_20} times as fast becomes {delayed}" in page
    off = [row["ms"]["median"] / row["predicted_ms"] - 1 for (_, link), row in of.items() if link]
    assert f"are {-min(off):.0%} below to {max(off):.0%} above it" in page
    assert all(abs(row["sent_bytes"] / row["predicted_bytes"] - 1) < 0.025 for row in of.values())
    headers = [row["wire_bytes"] / row["sent_bytes"] - 1 for row in of.values()]
    assert f"the wire carries {min(headers):.0%} to {max(headers):.0%} more".replace("%", "", 1) in page
    rates = [row["mbit_per_second"]["median"] for row in found["probes"][1:]]
    assert f"medians of {rates[0]:.0f} and {rates[1]:.0f} Mbit/s" in page
    nothing = [f"{row['nothing_ms']['median']:.1f}" for row in found["probes"][1:]]
    assert "nothing took {}, {} and {} ms".format(*nothing) in page
    assert f"{found['exchanges_of_step']} exchanges" in page
