"""What clients may send and queue, and what becomes of an engine that hangs, where an engine takes few requests."""

import contextlib
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from examples import demo
from tests.serving.conftest import FEW
from tests.soak.load import processes
from tests.support.polling import eventually

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("url", ["few at a time"], indirect=True)]
CLIENTS, NEW, TAKES = 16, 64, FEW["max_num_queued_reqs"]


def complete(url: str, **changes) -> httpx.Response:
    request = {"model": demo.MODEL_ID, "prompt": "In the beginning", "max_tokens": 8, **changes}
    return httpx.post(f"{url}/completions", json=request, timeout=300)


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"n": 65}, 400),
        ({"prompt": ["In the beginning"] * 129}, 400),
        ({"prompt": "a" * 100_000}, 413),
        ({"model": f"{demo.MODEL_ID}:adapter"}, 404),
    ],
)
def test_requests_beyond_a_bound_are_refused(url, changes, status):
    refused = complete(url, **changes)
    assert refused.status_code == status, refused.text
    assert refused.json()["error"]["message"]
    assert complete(url).status_code == 200


def test_an_overloaded_engine_refuses_and_answers_the_rest(cluster, url):
    """Four times as many requests at once as it takes: those beyond are told at once when to come again, the others get
    their whole answers. The engine stands still meanwhile, so that none is answered before all have come."""
    (core,) = processes(cluster, "VLLM::EngineCore")
    with ThreadPoolExecutor(CLIENTS) as pool:
        core.suspend()
        waiting = [pool.submit(complete, url, max_tokens=NEW, ignore_eos=True) for _ in range(CLIENTS)]
        try:
            eventually(lambda: sum(answer.done() for answer in waiting) == CLIENTS - TAKES)
        finally:
            core.resume()
        answers = [answer.result() for answer in waiting]
    assert Counter(answer.status_code for answer in answers) == {503: CLIENTS - TAKES, 200: TAKES}
    for answer in answers:
        if answer.status_code == 200:
            assert answer.json()["usage"]["completion_tokens"] == NEW
        else:
            assert answer.headers["retry-after"] == "1" and "try again" in answer.json()["error"]["message"]
    assert complete(url).status_code == 200


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
def test_the_engine_stops_when_a_client_leaves(cluster, url, streams):
    """Its answers would take minutes: two at a time of 60."""
    (core,) = processes(cluster, "VLLM::EngineCore")
    endless = {"model": demo.MODEL_ID, "prompt": "In the beginning", "max_tokens": 480, "ignore_eos": True, "n": 60}

    def seconds_worked() -> float:
        """CPU time of half a second of the engine's life."""
        before = sum(core.cpu_times()[:2])
        time.sleep(0.5)
        return sum(core.cpu_times()[:2]) - before

    with (
        httpx.Client(timeout=httpx.Timeout(300, read=5)) as client,
        contextlib.suppress(httpx.ReadTimeout),
        client.stream("POST", f"{url}/completions", json=endless | {"stream": streams}) as answer,
    ):
        if streams:
            next(answer.iter_lines())
            assert seconds_worked() > 0.1
    left = time.monotonic()
    eventually(lambda: seconds_worked() < 0.1)
    print(f"the engine was idle {time.monotonic() - left:.1f} s later")
    assert complete(url).status_code == 200


def test_an_engine_that_hangs_is_replaced(cluster, url):
    """The last test: whatever a stopped process was doing, nothing tells it from one that waits."""
    (core,) = processes(cluster, "VLLM::EngineCore")
    core.suspend()
    eventually(lambda: not core.is_running() and complete(url).status_code == 200)
    assert len(processes(cluster, "VLLM::EngineCore")) == 1
