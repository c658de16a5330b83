"""The keeper of the policy in force, and replicas that follow it, in one process: who runs what when something dies."""

import asyncio
import json
import math
import re

import pytest

from serve_apps.settings import Follower, SettingsKeeper

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
        super().__init__(name, settings, keeper.follow, self.tell_workers)
        self.runs = settings

    async def tell_workers(self, settings):
        self.runs = self.runs | settings

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
        ({"select_top_k": 9}, r"select_top_k \(9\) must be between 1 and"),
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
    assert runs == recommended | {"enabled": False, "min_rows": 4, "max_rows": None, "rows": "decode"}
    assert all("recommended leaves no choice of" in answer["error"] for answer in refused)
    changed = [state["settings"][name] for name in ("enabled", "min_rows", "select_top_k")]
    assert changed == [False, 4, None]
