"""The controller in a served application: more requests than the engine runs, and then none."""

import asyncio

import openai
import pytest

from examples.application import served
from examples.tiny_moe.data import MODEL_ID
from sere_dist.admin import change_settings, pin_price, request_settings
from sere_dist.environment import ADMIN_TOKEN
from sere_dist.testing.local_cluster import free_ports
from tests.soak.load import ENVIRONMENT
from tests.support.polling import eventually

pytestmark = pytest.mark.slow
CONTROL = {"prices": [0.0, 0.01, 0.02], "waiting": 1, "period_s": 10}


@pytest.fixture
def url(cluster, projection_path, monkeypatch):
    arguments = {
        "rerouting": {"artifact": str(projection_path), "policy": "projection", "select_top_k": 1},
        "control": CONTROL,
        "engine": {"max_model_len": 512, "enforce_eager": True, "kv_cache_memory_bytes": 2**27, "max_num_seqs": 2},
        "environment": ENVIRONMENT,
    }
    monkeypatch.setenv(ADMIN_TOKEN, cluster.environment[ADMIN_TOKEN])
    with served(cluster, free_ports(1)[0], artifact=projection_path, **arguments) as url:
        yield url


def controlled(url: str) -> dict:
    return request_settings(url)["control"]


async def crowd(url: str, until) -> None:
    """Keeps twelve requests in the air until a condition holds."""
    client = openai.AsyncOpenAI(base_url=url, api_key="none")
    done = asyncio.Event()

    async def ask() -> None:
        while not done.is_set():
            await client.completions.create(
                model=MODEL_ID, prompt="In the beginning", max_tokens=64, extra_body={"ignore_eos": True}
            )

    asking = [asyncio.create_task(ask()) for _ in range(12)]
    try:
        await asyncio.to_thread(eventually, until)
    finally:
        done.set()
        await asyncio.gather(*asking)


def test_the_price_follows_the_load_and_can_be_pinned(url):
    assert not request_settings(url)["settings"]["enabled"]
    asyncio.run(crowd(url, lambda: controlled(url)["price"] == 0.02))
    state = request_settings(url)
    assert state["settings"]["enabled"] and state["settings"]["expert_price"] == 0.02
    assert "of the objective" in state["control"]["why"]
    eventually(lambda: controlled(url)["price"] == 0)
    assert not request_settings(url)["settings"]["enabled"]

    change_settings(url, {"expert_price": 0.005, "enabled": True})
    assert controlled(url)["pinned"]
    asyncio.run(crowd(url, lambda: next(iter(request_settings(url)["measured"].values())).get("requests", 0) > 24))
    assert request_settings(url)["settings"]["expert_price"] == 0.005
    pin_price(url, False)
    assert not request_settings(url)["settings"]["enabled"]
