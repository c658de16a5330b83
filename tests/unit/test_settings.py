"""The keeper of the policy in force, and replicas that follow it, in one process: who runs what when something dies."""

import asyncio
import json
import math
import re

import pytest

from sere_dist.artifact.recommendation import KlEstimate
from serve_apps.control import BLIND, ControlConfig
from serve_apps.settings import Follower, SettingsKeeper, measures

TOP_K = 8
SETTINGS = {"artifact": "an/artifact", "select_top_k": 2}
OTHERS = SETTINGS | {"select_top_k": 4}


class Here:
    """A cluster of one process: what is kept, and who lives."""

    def __init__(self, *living: str):
        self.kept, self.living = None, set(living)

    def load(self) -> dict | None:
        return None if self.kept is None else json.loads(self.kept)

    def save(self, kept: dict) -> None:
        self.kept = json.dumps(kept)

    def replicas(self) -> set[str]:
        return set(self.living)


class Replica(Follower):
    """One whose workers run what they were told last."""

    def __init__(self, name: str, keeper: SettingsKeeper, settings=SETTINGS):
        super().__init__(name, settings, keeper.follow, self.tell_workers, self.count)
        self.runs, self.totals = settings, {"requests": 0}

    async def tell_workers(self, settings):
        self.runs = self.runs | settings

    async def count(self):
        return dict(self.totals)

    async def forever(self):
        while True:
            await self.once(wait_s=5)


@pytest.fixture
def here() -> Here:
    return Here("a", "b")


@pytest.fixture
def keeper(here) -> SettingsKeeper:
    return SettingsKeeper(SETTINGS, TOP_K, here)


def test_a_change_waits_until_all_replicas_run_it(keeper):
    async def scenario():
        replicas = [Replica("a", keeper), Replica("b", keeper)]
        tasks = [asyncio.create_task(replica.forever()) for replica in replicas]
        await asyncio.sleep(0)
        state = await keeper.change({"select_top_k": 3}, wait_s=5)
        for task in tasks:
            task.cancel()
        return state, [replica.runs["select_top_k"] for replica in replicas]

    state, runs = asyncio.run(scenario())
    assert runs == [3, 3] and state["settings"]["select_top_k"] == 3 and state["revision"] > 0
    assert (state["replicas"], state["pending"]) == (["a", "b"], [])


def test_replicas_that_do_not_confirm_are_named(keeper, here):
    """However long ago they were heard of: one that is stuck, one that was never heard of, and one of another version;
    but not those that are gone."""
    here.living |= {"silent", "old"}

    async def scenario():
        stuck, gone, other = Replica("a", keeper), Replica("gone", keeper), Replica("old", keeper, OTHERS)
        for replica in (stuck, gone, other, Replica("b", keeper)):
            await replica.once(wait_s=0.01)
        current = asyncio.create_task(Replica("b", keeper).forever())
        state = await keeper.change({"enabled": False}, wait_s=0.1)
        current.cancel()
        return state

    state = asyncio.run(scenario())
    assert state["replicas"] == ["a", "b", "old", "silent"] and state["pending"] == ["a", "old", "silent"]


def test_a_replica_that_starts_later_runs_the_same(keeper):
    async def scenario():
        await keeper.change({"select_top_k": 3}, wait_s=0)
        await keeper.change({"enabled": False}, wait_s=0)
        late = Replica("late", keeper)
        await late.once(wait_s=0)
        return late.runs

    runs = asyncio.run(scenario())
    assert (runs["select_top_k"], runs["enabled"]) == (3, False)


def test_a_keeper_that_starts_again_knows_what_is_in_force(keeper, here):
    """Though it is asked to change something before any replica has come back. Then all run the same, and a replica
    counts only once it has said so."""

    async def scenario():
        old = Replica("a", keeper)
        await keeper.change({"enabled": False}, wait_s=0)
        await old.once(wait_s=0)
        again = SettingsKeeper(SETTINGS, TOP_K, here)
        changed = await again.change({"select_top_k": 4}, wait_s=0)
        replicas = old, Replica("b", again)
        old.follow = again.follow
        for replica in replicas:
            await replica.once(wait_s=0)
            await replica.once(wait_s=0)
        return changed, await again.state(), [replica.runs for replica in replicas]

    changed, state, runs = asyncio.run(scenario())
    assert changed["pending"] == ["a", "b"] and state["pending"] == []
    assert [(each["enabled"], each["select_top_k"]) for each in runs] == [(False, 4)] * 2
    assert not state["settings"]["enabled"] and state["settings"]["select_top_k"] == 4


def test_what_is_in_force_survives_the_keeper_and_all_replicas(keeper, here):
    asyncio.run(keeper.change({"enabled": False}, wait_s=0))
    assert not asyncio.run(SettingsKeeper(SETTINGS, TOP_K, here).state())["settings"]["enabled"]


def test_other_settings_that_are_deployed_hold(keeper, here):
    """What was changed before is over, and the revision is a new one."""
    before = asyncio.run(keeper.change({"enabled": False}, wait_s=0))
    after = asyncio.run(SettingsKeeper(OTHERS, TOP_K, here).state())
    assert after["settings"]["enabled"] and after["settings"]["select_top_k"] == 4
    assert after["revision"] > before["revision"]
    assert asyncio.run(SettingsKeeper(SETTINGS, TOP_K, here).state())["settings"]["enabled"]


def test_replicas_of_another_configuration_are_left_alone(keeper):
    """During an upgrade, those of the old application ask the new one's keeper."""

    async def scenario():
        other = Replica("old", keeper, OTHERS)
        await keeper.change({"threshold": 0.5}, wait_s=0)
        await other.once(wait_s=0.01)
        return other.runs

    assert asyncio.run(scenario()) == OTHERS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"select_top_k": 9}, r"select_top_k \(9\) must be at most the model"),
        ({"select_top_k": "many", "threshold": 2}, "select_top_k: .*\nthreshold: "),
        ({"artifact": "elsewhere"}, "artifact can't be changed while serving; enabled, "),
        ({"min_rows": 2**70}, "min_rows: Input should be less than or equal to 2147483647"),
        ({"min_rows": 5, "max_rows": 2}, r"max_rows \(2\) must not be less than min_rows"),
        ({"traffic_price": 0.1}, "needs policy: projection"),
        ({"expert_price": 0.1}, r"expert_price \(0.1\) needs policy: projection"),
        ({"expert_price": -0.1}, "expert_price: Input should be greater than or equal to 0"),
        ({"expert_price": math.inf}, "expert_price: Input should be a finite number"),
    ],
)
def test_what_is_out_of_range_changes_nothing(keeper, changes, message):
    async def scenario():
        before = await keeper.state()
        answer = await keeper.change(changes)
        return answer["error"], before, await keeper.state()

    error, before, after = asyncio.run(scenario())
    assert re.search(message, error) and before == after


def test_what_an_artifact_recommends_is_not_changed_piecemeal(here):
    recommended = {"artifact": "artifact", "policy": "recommended"}

    async def scenario():
        keeper = SettingsKeeper(recommended, TOP_K, here)
        names = ("select_top_k", "threshold", "expert_price", "traffic_price")
        refused = [await keeper.change({name: value}) for name in names for value in (0, 1)]
        state = await keeper.change({"enabled": False, "min_rows": 4}, wait_s=0)
        replica = Replica("a", keeper, recommended)
        await replica.once(wait_s=0)
        return refused, state, replica.runs

    refused, state, runs = asyncio.run(scenario())
    others = {"max_rows": None, "rows": "decode", "share": 1, "shadow_share": None}
    assert runs == recommended | {"enabled": False, "min_rows": 4} | others
    assert all("recommended leaves no choice of" in answer["error"] for answer in refused)
    changed = [state["settings"][name] for name in ("enabled", "min_rows", "select_top_k")]
    assert changed == [False, 4, None]


TRIAL = {"changes": {"select_top_k": 1}, "replicas": 1, "take_back_if": {"inter_token_ms": 40}}


def served_by(replica: Replica, requests: int = 16, tokens: int = 100, ms: float = 20.0) -> None:
    """Lets a replica have answered further requests."""
    added = {"requests": requests, "next_tokens": tokens, "next_token_s": tokens * ms / 1000}
    replica.totals = {name: replica.totals.get(name, 0) + value for name, value in added.items()}


async def both(replicas: tuple[Replica, ...], times: int = 2) -> None:
    for _ in range(times):
        for replica in replicas:
            await replica.once(wait_s=0)


def test_a_trial_runs_on_as_many_replicas_as_it_says(keeper, here):
    """What both sides measured since then stands beside each other. If the replica dies, another one goes on."""
    replicas = Replica("a", keeper), Replica("b", keeper)

    async def scenario():
        for replica in replicas:
            served_by(replica, ms=99)  # before the trial, so no part of it
        await both(replicas)
        await keeper.try_out(TRIAL, wait_s=0)
        await both(replicas)
        served_by(replicas[0], ms=30)
        served_by(replicas[1], ms=20)
        await both(replicas)
        state, ran = await keeper.state(), [replica.runs["select_top_k"] for replica in replicas]
        here.living = {"b", "c"}
        others = replicas[1], Replica("c", keeper)
        await both(others)
        return state, ran, await keeper.state(), [replica.runs["select_top_k"] for replica in others]

    state, ran, later, run_later = asyncio.run(scenario())
    assert ran == [1, 2] and run_later == [1, 2]
    assert state["trial"]["triers"] == ["a"] and later["trial"]["triers"] == ["b"]
    assert state["settings"]["select_top_k"] == 2 and state["pending"] == later["pending"] == []
    assert {name: each["inter_token_ms"] for name, each in state["measured"].items()} == pytest.approx(
        {"a": 30, "b": 20}
    )


@pytest.mark.parametrize(
    ("ms", "requests", "is_over"), [(41, 16, True), (41, 15, False), (40, 16, False)], ids=["slow", "few", "fast"]
)
def test_a_trial_beyond_its_limit_ends_by_itself(keeper, here, caplog, ms, requests, is_over):
    replicas = Replica("a", keeper), Replica("b", keeper)

    async def scenario():
        await keeper.change({"threshold": 0.5}, wait_s=0)
        await keeper.try_out(TRIAL, wait_s=0)
        await both(replicas)
        served_by(replicas[0], requests, ms=ms)
        await both(replicas)
        return await keeper.state()

    state = asyncio.run(scenario())
    assert [replica.runs["select_top_k"] for replica in replicas] == [2 if is_over else 1, 2]
    assert (state["trial"] is None) == is_over and state["settings"]["threshold"] == 0.5
    assert state["taken_back"] == ("inter_token_ms 41 > 40 on replica a with {'select_top_k': 1}" if is_over else None)
    assert ("audit: the trial is taken back: inter_token_ms" in caplog.text) == is_over
    kept = asyncio.run(SettingsKeeper(SETTINGS, TOP_K, here).state())
    assert (kept["trial"], kept["taken_back"]) == (state["trial"], state["taken_back"])


@pytest.mark.parametrize("end", ["try_out", "change"])
def test_a_trial_of_all_replicas_ends_when_told_to(keeper, end):
    """Or when settings are changed: those hold everywhere."""
    replicas = Replica("a", keeper), Replica("b", keeper)

    async def scenario():
        await keeper.try_out({"changes": {"select_top_k": 1}}, wait_s=0)
        await both(replicas)
        tried = [replica.runs["select_top_k"] for replica in replicas]
        await getattr(keeper, end)(None if end == "try_out" else {"threshold": 0.5}, wait_s=0)
        await both(replicas)
        return tried, await keeper.state()

    tried, state = asyncio.run(scenario())
    assert tried == [1, 1] and state["trial"] is None
    assert [replica.runs["select_top_k"] for replica in replicas] == [2, 2]


@pytest.mark.parametrize(
    ("trial", "message"),
    [
        ({}, "changes: Field required"),
        ({"changes": {}}, "changes: .* at least 1 item"),
        ({"changes": {"select_top_k": 9}}, r"select_top_k \(9\) must be at most the model"),
        (TRIAL | {"replicas": 0}, "replicas: .* greater than or equal to 1"),
        (TRIAL | {"take_back_if": {"estimated_error": 0.1}}, "policy sere estimates no error: leave that limit out"),
        (
            TRIAL | {"take_back_if": {"estimated_kl": 0.1}},
            "estimated_kl needs an artifact of method projection that was",
        ),
        (TRIAL | {"take_back_if": {"shadow_kl": 0.1}}, "shadow_kl is measured with a shadow_share: set one"),
        (TRIAL | {"take_back_if": {"mood": 1}}, "take_back_if.mood.*: Input should be 'inter_token_ms', "),
        (TRIAL | {"until": 3}, "until: Extra inputs"),
    ],
)
def test_a_trial_that_cannot_be_changes_nothing(keeper, trial, message):
    async def scenario():
        before = await keeper.state()
        answer = await keeper.try_out(trial)
        return answer["error"], before, await keeper.state()

    error, before, after = asyncio.run(scenario())
    assert re.search(message, error) and before == after


PROJECTION = SETTINGS | {"policy": "projection", "select_top_k": 1}
CONTROL = ControlConfig(prices=[0, 0.01, 0.02], waiting=4, max_kl=0.05)
ESTIMATE = KlEstimate(nats=1.0, spread=1.5, layers=6)


def controlled(here: Here) -> SettingsKeeper:
    return SettingsKeeper(PROJECTION, TOP_K, here, kl_estimate=ESTIMATE, control=CONTROL)


async def period(keeper: SettingsKeeper, replicas: list[Replica], waiting: float, error: float = 0.0) -> float | None:
    """Lets so many requests wait for each replica, and the controller decide. Returns the price that all run then, None
    where they run without re-routing."""
    for replica in replicas:
        added = {"engine_steps": 10, "waiting_requests": 10 * waiting, "next_tokens": 1500, "rows": 60}
        added |= {"estimated_error": 60 * error, "seconds": 15}
        replica.totals = {name: replica.totals.get(name, 0) + value for name, value in added.items()}
        await replica.once(wait_s=0)
    await keeper.control_once()
    for replica in replicas:
        await replica.once(wait_s=0)
    (price,) = {replica.runs["expert_price"] if replica.runs["enabled"] else None for replica in replicas}
    return price


async def of_projection(keeper: SettingsKeeper) -> list[Replica]:
    """Returns two replicas that run what is in force."""
    replicas = [Replica(name, keeper, PROJECTION) for name in ("a", "b")]
    for replica in replicas:
        await replica.once(wait_s=0)
    return replicas


def test_the_price_follows_the_load(here):
    keeper = controlled(here)

    async def scenario():
        replicas = await of_projection(keeper)
        prices = [await period(keeper, replicas, waiting) for waiting in (0, 6, 6, 6, 0, 0, 0, 0)]
        return prices, await keeper.state()

    prices, state = asyncio.run(scenario())
    # The third is too early to tell. At the end it is calm, but the price below was too small for as many tokens.
    assert prices == [None, 0.01, 0.01, 0.02, 0.02, 0.02, 0.02, 0.02]
    assert state["control"]["price"] == 0.02 and not state["control"]["pinned"]
    assert "a smaller price was not enough for 100 tokens per second and replica" in state["control"]["why"]


def test_a_load_is_that_of_seconds_at_the_settings_in_force(here):
    """A replica reports as soon as it runs new settings, and later as often as it likes; another is new."""
    keeper = controlled(here)

    async def scenario():
        old, new = await of_projection(keeper)
        rates = []
        for seconds, tokens in ((1, 1000), (20, 1000), (2, 7000), (10, 1000)):
            added = {"engine_steps": 10, "waiting_requests": 0, "next_tokens": tokens, "seconds": seconds}
            old.totals = {name: old.totals.get(name, 0) + value for name, value in added.items()}
            await old.once(wait_s=0)
            rates.append(keeper._load().tokens_per_s)
        new.totals = {"engine_steps": 10, "waiting_requests": 0, "next_tokens": 500, "seconds": 10}
        await new.once(wait_s=0)
        old.totals |= {"seconds": 53, "next_tokens": 15000}
        await old.once(wait_s=0)
        return rates, keeper._load().tokens_per_s

    rates, together = asyncio.run(scenario())
    assert rates == [0, 2000 / 21, 0, 8000 / 12]
    assert together == (500 / 10 + 5000 / 20) / 2


def test_the_price_keeps_its_budget(here):
    keeper = controlled(here)

    async def scenario():
        replicas = await of_projection(keeper)
        return [await period(keeper, replicas, 6, error) for error in (0, 0.001, 0.001, 0.01, 0.01)]

    assert asyncio.run(scenario()) == [0.01, 0.01, 0.02, 0.01, None]  # 6 layers: 0.06 nats are over 0.05


def test_a_price_that_somebody_sets_is_pinned(here):
    keeper = controlled(here)

    async def scenario():
        replicas = await of_projection(keeper)
        await keeper.change({"expert_price": 0.3, "enabled": True}, wait_s=0)
        pinned = [await period(keeper, replicas, 9) for _ in range(3)]
        again = controlled(here)  # the keeper dies
        replicas = await of_projection(again)
        pinned.append(await period(again, replicas, 9))
        await again.pin({"pinned": False}, wait_s=0)
        return pinned, [await period(again, replicas, waiting) for waiting in (0, 6)]

    pinned, free = asyncio.run(scenario())
    assert pinned == [0.3] * 4 and free == [None, 0.01]


def test_a_keeper_that_starts_again_goes_on_at_the_same_price(here):
    async def scenario():
        keeper = controlled(here)
        await period(keeper, await of_projection(keeper), 6)
        again = controlled(here)
        return await period(again, await of_projection(again), 3)

    assert asyncio.run(scenario()) == 0.01


def test_the_controller_waits_for_a_trial_and_falls_back_when_it_sees_nothing(here):
    async def scenario():
        keeper = controlled(here)
        replicas = await of_projection(keeper)
        await period(keeper, replicas, 6)
        await keeper.try_out({"changes": {"expert_price": 0.5}}, wait_s=0)
        tried = await period(keeper, replicas, 9)
        await keeper.try_out(None, wait_s=0)
        back = await period(keeper, replicas, 3)
        for _ in range(1 + BLIND):  # the first has what they said last
            await keeper.control_once()
        for replica in replicas:
            await replica.once(wait_s=0)
        return tried, back, replicas[0].runs["enabled"]

    assert asyncio.run(scenario()) == (0.5, 0.01, False)


def test_what_a_pin_must_be(keeper, here):
    assert "no control" in asyncio.run(keeper.pin({"pinned": True}))["error"]
    for told in ({}, {"pinned": "yes"}, {"pinned": True, "price": 1}):
        assert "the body must be" in asyncio.run(controlled(here).pin(told))["error"]


def test_ranks_of_a_group_run_the_same(here):
    keeper = SettingsKeeper(SETTINGS, TOP_K, here, is_group=True)
    assert "leave out `replicas`" in asyncio.run(keeper.try_out(TRIAL))["error"]
    assert asyncio.run(keeper.try_out({"changes": {"select_top_k": 1}}, wait_s=0))["trial"]["triers"] == ["a", "b"]


def test_measures():
    totals = {"requests": 8, "refused": 2, "first_tokens": 4, "first_token_s": 2.0, "next_tokens": 100}
    totals |= {"next_token_s": 3.0, "steps": 10, "active_experts_after": 320, "rows": 20, "rerouted_slots": 40}
    totals |= {"estimated_error": 0.5}
    assert measures(totals, TOP_K) == {
        "requests": 8,
        "refused_share": 0.25,
        "first_token_ms": 500,
        "inter_token_ms": 30,
        "active_experts": 32,
        "rerouted_share": 0.25,
        "estimated_error": 0.025,
    }
    assert measures({}, TOP_K) == {"requests": 0}
    estimate = KlEstimate(nats=0.8, spread=1.5, layers=6)
    assert measures(totals, TOP_K, estimate)["estimated_kl"] == pytest.approx(0.8 * 0.025 * 6)
    assert measures({}, TOP_K, estimate) == {"requests": 0}
    checked = {"shadow_kl": 0.6, "shadow_rows": 12}
    assert measures(totals | checked, TOP_K) == measures(totals, TOP_K) | {"shadow_kl": pytest.approx(0.05)}
    assert "shadow_kl" not in measures(totals | {"shadow_kl": 0.0, "shadow_rows": 0}, TOP_K)
