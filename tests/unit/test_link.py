"""When packets arrive on a link; tests/cluster has a real one."""

import pytest

from sere_dist.testing.link import Way


def test_packets_leave_one_after_the_other_and_arrive_later():
    way = Way(rate=8000, delay=0.5)  # 1,000 bytes per second
    way.enter(b"a" * 100, now=10.0)
    way.enter(b"b" * 200, now=10.0)  # leaves when the first has left
    way.enter(b"c" * 100, now=20.0)  # the link has been idle
    assert [due for due, _ in way.waiting] == pytest.approx([10.6, 10.8, 20.6])
    assert way.next_at() == pytest.approx(10.6)


def test_an_open_link_delays_nothing():
    way = Way()
    assert way.next_at() == float("inf")
    way.enter(b"a" * 9000, now=3.0)
    assert way.next_at() == 3.0
