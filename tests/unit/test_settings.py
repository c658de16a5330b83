"""The keeper of the policy in force, and replicas that follow it, in one process: who runs what when something dies."""

import asyncio
import math
import re

import pytest

from serve_apps.settings import Follower, SettingsKeeper

TOP_K = 8
SETTINGS = {"artifact": "an/artifact", "select_top_k": 2}


class Replica(Follower):
    """One whose workers remember what they were told."""

    def __init__(self, name: str, keeper: SettingsKeeper, settings=SETTINGS):
        super().__init__(name, settings, keeper.follow, self.tell_workers)
        self.told = []

    async def tell_workers(self, changes):
        self.told.append(changes)

    async def forever(self):
        while True:
            await self.once(wait_s=5)


def test_a_change_waits_until_all_replicas_run_it():
    async def scenario():
        keeper = SettingsKeeper(SETTINGS, TOP_K)
        replicas = [Replica("a", keeper), Replica("b", keeper)]
        tasks = [asyncio.create_task(replica.forever()) for replica in replicas]
        await asyncio.sleep(0)
        state = await keeper.change({"select_top_k": 3}, wait_s=5)
        for task in tasks:
            task.cancel()
        return state, [replica.told for replica in replicas]

    state, told = asyncio.run(scenario())
    assert told == [[{"select_top_k": 3}]] * 2
    assert state["settings"]["select_top_k"] == 3 and state["revision"] > 0
    assert (state["replicas"], state["pending"]) == (["a", "b"], [])


def test_a_replica_that_does_not_answer_is_named():
    async def scenario():
        keeper = SettingsKeeper(SETTINGS, TOP_K)
        await Replica("a", keeper).once(wait_s=0)
        return await keeper.change({"enabled": False}, wait_s=0.05)

    state = asyncio.run(scenario())
    assert (state["replicas"], state["pending"]) == (["a"], ["a"])


def test_a_replica_that_is_gone_is_forgotten(monkeypatch):
    async def scenario():
        keeper = SettingsKeeper(SETTINGS, TOP_K)
        await Replica("a", keeper).once(wait_s=0)
        monkeypatch.setattr("serve_apps.settings.FORGET_SECONDS", -1)
        return await keeper.change({"enabled": False}, wait_s=5)

    assert asyncio.run(scenario())["replicas"] == []


def test_a_replica_that_starts_later_runs_the_same():
    async def scenario():
        keeper, late = SettingsKeeper(SETTINGS, TOP_K), None
        await keeper.change({"select_top_k": 3}, wait_s=0)
        await keeper.change({"enabled": False}, wait_s=0)
        late = Replica("late", keeper)
        await late.once(wait_s=0)
        return late.told

    assert asyncio.run(scenario()) == [{"select_top_k": 3, "enabled": False}]


def test_a_keeper_that_starts_again_learns_from_the_replicas():
    async def scenario():
        keeper = SettingsKeeper(SETTINGS, TOP_K)
        replica = Replica("a", keeper)
        await keeper.change({"threshold": 0.5}, wait_s=0)
        await replica.once(wait_s=0)
        keeper = SettingsKeeper(SETTINGS, TOP_K)
        replica.follow = keeper.follow
        await replica.once(wait_s=0)
        changed = await keeper.change({"enabled": False}, wait_s=0)
        await replica.once(wait_s=0)
        return changed["settings"], replica.told

    policy, told = asyncio.run(scenario())
    assert policy["threshold"] == 0.5 and not policy["enabled"]
    assert told == [{"threshold": 0.5}, {"threshold": 0.5, "enabled": False}]


def test_replicas_of_another_configuration_are_left_alone():
    """During an upgrade, those of the old application ask the new one's keeper."""

    async def scenario():
        keeper = SettingsKeeper(SETTINGS, TOP_K)
        other = Replica("old", keeper, SETTINGS | {"select_top_k": 4})
        other.revision, other.changes = 2**60, {"enabled": False}
        await keeper.change({"threshold": 0.5}, wait_s=0)
        await other.once(wait_s=0.01)
        return await keeper.state(), other.told

    state, told = asyncio.run(scenario())
    assert state["settings"]["enabled"] and state["replicas"] == [] and told == []


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
def test_what_is_out_of_range_changes_nothing(changes, message):
    async def scenario():
        keeper = SettingsKeeper(SETTINGS, TOP_K)
        before = await keeper.state()
        answer = await keeper.change(changes)
        return answer["error"], before, await keeper.state()

    error, before, after = asyncio.run(scenario())
    assert re.search(message, error) and before == after


def test_what_an_artifact_recommends_is_not_changed_piecemeal():
    async def scenario():
        keeper = SettingsKeeper({"artifact": "artifact", "policy": "recommended"}, TOP_K)
        names = ("select_top_k", "threshold", "expert_price", "traffic_price")
        refused = [await keeper.change({name: value}) for name in names for value in (0, 1)]
        return refused, await keeper.change({"enabled": False, "min_rows": 4}, wait_s=0)

    refused, state = asyncio.run(scenario())
    assert all("recommended leaves no choice of" in answer["error"] for answer in refused)
    changed = [state["settings"][name] for name in ("enabled", "min_rows", "select_top_k")]
    assert changed == [False, 4, None]
