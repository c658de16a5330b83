"""What clients may send and queue, and what becomes of an engine that hangs, where an engine takes few requests."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from examples.tiny_moe.data import MODEL_ID
from tests.serving.conftest import FEW
from tests.soak.load import processes
from tests.support.polling import eventually

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("url", ["few at a time"], indirect=True)]
CLIENTS, NEW, TAKES = 16, 64, FEW["max_num_queued_reqs"]


def complete(url: str, **changes) -> httpx.Response:
    request = {"model": MODEL_ID, "prompt": "In the beginning", "max_tokens": 8, **changes}
    return httpx.post(f"{url}/completions", json=request, timeout=300)


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"n": 65}, 400),
        ({"prompt": ["In the beginning"] * 129}, 400),
        ({"prompt": "a" * 100_000}, 413),
        ({"model": f"{MODEL_ID}:adapter"}, 404),
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


def test_an_engine_that_hangs_is_replaced(cluster, url):
    """The last test: whatever a stopped process was doing, nothing tells it from one that waits."""
    (core,) = processes(cluster, "VLLM::EngineCore")
    core.suspend()
    eventually(lambda: not core.is_running() and complete(url).status_code == 200)
    assert len(processes(cluster, "VLLM::EngineCore")) == 1
