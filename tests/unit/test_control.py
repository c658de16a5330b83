"""The controller against simulated loads: a queue that is served the faster, the higher the price is."""

import math
import random
from itertools import pairwise

import pytest
from pydantic import ValidationError

from serve_apps.control import BLIND, FORGET, PATIENCE, ControlConfig, Controller, Load, places_of

PRICES = [0.0, 0.005, 0.01, 0.02]
SERVED = [1.0, 1.2, 1.4, 1.6]  # requests per second at each price
KL = [0.0, 0.004, 0.01, 0.02]
CONFIG = ControlConfig(prices=PRICES, waiting=4)
# Of more requests, with a ladder of five prices, a decision every 10 seconds, and phases of a minute. The first price
# copes with 0.4 of the peak, the last with all of it.
PEAK, DAY, PHASE = 10.0, (0.2, 0.5, 0.8, 1.0, 1.0, 0.8, 0.5, 0.2), 6
FIVE = ControlConfig(prices=[0.0, 0.0025, 0.005, 0.01, 0.02], waiting=4, period_s=10)
FIVE_SERVED = [4.0, 5.5, 7.0, 8.5, 10.5]


def simulate(
    arrivals: list[float], config: ControlConfig = CONFIG, served: list[float] = SERVED
) -> tuple[list[int], list[float]]:
    """Returns the place of the price and the requests that wait, by period, for arrivals per second by period. A price
    serves so many requests per second."""
    controller, waiting = Controller(config), 0.0
    places, queue = [], []
    for rate in arrivals:
        before = waiting
        waiting = max(0.0, waiting + config.period_s * (rate - served[controller.place]))
        given = rate - (waiting - before) / config.period_s
        kl = KL[controller.place] if served is SERVED else None
        load = Load(waiting=(before + waiting) / 2, tokens_per_s=given, estimated_kl=kl)
        places.append(controller.decide(load).place)
        queue.append(waiting)
    return places, queue


def within(arrivals: list[float], queue: list[float], config: ControlConfig) -> float:
    """Returns the share of requests that come when no more wait than may."""
    return sum(rate for rate, waits in zip(arrivals, queue, strict=True) if waits <= config.waiting) / sum(arrivals)


def changes(places: list[int]) -> int:
    return sum(one != other for one, other in pairwise([0, *places]))


def test_slack_keeps_quality():
    places, queue = simulate([0.9] * 200)
    assert set(places) == {0} and max(queue) == 0


def test_a_step_of_load_is_followed_up_and_down():
    places, queue = simulate([0.5] * 20 + [1.5] * 60 + [0.5] * 60)
    assert max(places[:20]) == 0
    assert max(places[20:80]) == 3 and places[20:].index(3) < 8  # up within eight periods
    assert places[-1] == 0 and max(queue[-40:]) == 0
    assert max(queue) < 60


@pytest.mark.parametrize("rate", [1.1, 1.15, 1.3, 1.45])
def test_a_steady_load_between_two_prices_does_not_oscillate(rate):
    """The price below is tried once in a while, when what was seen of it is old."""
    places, queue = simulate([rate] * 2000)
    assert changes(places[-500:]) <= 2 * 3 * (500 // FORGET + 1)
    needed = next(place for place, served in enumerate(SERVED) if served > rate)
    assert sum(place == needed for place in places) > 0.8 * len(places)
    assert sum(queue) / len(queue) < 4


@pytest.mark.parametrize(("share", "needed", "periods"), [(0.5, 1, 1), (0.65, 2, 1), (0.8, 3, 1), (0.95, 4, 3)])
def test_a_step_is_met_by_its_size(share, needed, periods):
    """The price that is needed is in force after so many periods. It stays, but for tries of smaller ones."""
    arrivals = [0.2 * PEAK] * 10 + [share * PEAK] * 60
    places, queue = simulate(arrivals, FIVE, FIVE_SERVED)
    up = places[10:]
    assert next(i for i, place in enumerate(up, 1) if place >= needed) <= periods
    assert sum(place == needed for place in up) > 0.85 * len(up) and changes(up) <= 6
    assert within(arrivals, queue, FIVE) > 0.8


@pytest.mark.parametrize("share", [0.5, 0.65, 0.8, 0.95])
@pytest.mark.parametrize("periods", [20, 200])
def test_a_load_that_falls_takes_the_price_with_it(share, periods):
    """From whatever price, and after the controller has tried the smaller ones again: at once, when it is calm."""
    places, _ = simulate([0.2 * PEAK] * 10 + [share * PEAK] * periods + [0.2 * PEAK] * 30, FIVE, FIVE_SERVED)
    assert set(places[10 + periods + PATIENCE :]) == {0}


@pytest.mark.parametrize("phase", [PHASE, 4 * PHASE, 40 * PHASE])
def test_a_day_in_minutes_or_hours_is_followed(phase):
    arrivals = [share * PEAK for share in DAY for _ in range(phase)]
    places, queue = simulate(arrivals, FIVE, FIVE_SERVED)
    assert within(arrivals, queue, FIVE) > (0.7 if phase == PHASE else 0.85)
    assert sum(FIVE.prices[place] for place in places) / len(places) < 0.65 * FIVE.prices[-1]
    assert max(places) == 4 and set(places[:phase]) == set(places[-phase + PATIENCE :]) == {0}


def test_a_price_that_is_too_great_falls_to_the_least_that_is_enough():
    """A peak of half a minute takes the greatest price; what comes after it needs the second, and one try too small."""
    arrivals = [0.2 * PEAK] * 10 + [PEAK] * 3 + [0.5 * PEAK] * 60
    places, queue = simulate(arrivals, FIVE, FIVE_SERVED)
    assert max(places) == 4
    assert set(places[10 + 3 + 5 * PATIENCE :]) <= {0, 1} and changes(places[40:]) <= 3
    assert max(queue[20:]) <= FIVE.waiting + 10


@pytest.mark.parametrize("share", [0.45, 0.6, 0.75, 0.9])
def test_a_steady_load_that_varies_by_chance_does_not_oscillate(share):
    """Arrivals vary by a tenth. In ten hours a price changes every three minutes at most, as a mean."""
    chance = random.Random(0)
    arrivals = [share * PEAK * chance.gauss(1, 0.1) for _ in range(3600)]
    places, queue = simulate(arrivals, FIVE, FIVE_SERVED)
    assert changes(places) / 10 < 24
    assert within(arrivals, queue, FIVE) > 0.93
    needed = next(place for place, served in enumerate(FIVE_SERVED) if served > share * PEAK)
    assert needed - 0.1 < sum(places) / len(places) < needed + 0.5


def test_a_ramp_rises_step_by_step():
    places, _ = simulate([0.8 + 0.7 * i / 300 for i in range(300)])
    first = [places.index(place) for place in range(4)]
    assert first == sorted(first) and first[1] > 80


def test_bursts_are_over_before_quality_is_given_away_for_long():
    bursts = [1.5 if i % 40 < 3 else 0.4 for i in range(400)]
    places, queue = simulate(bursts)
    assert sum(map(bool, places)) < 0.45 * len(places)
    assert max(queue) < 60


def test_a_day_costs_a_third_of_what_the_greatest_price_costs():
    day = [0.9 - 0.55 * math.cos(2 * math.pi * i / 1000) for i in range(1000)]  # from 0.35 to 1.45 per second
    places, queue = simulate(day)
    fixed = [KL[-1]] * len(day)
    assert sum(KL[place] for place in places) < sum(fixed) / 3
    assert sum(waits > 4 * CONFIG.waiting for waits in queue) < 0.05 * len(queue)


def test_a_budget_is_a_ceiling():
    config = CONFIG.model_copy(update={"max_kl": 0.012})
    places, _ = simulate([1.5] * 200, config)
    over = [i for i, place in enumerate(places) if place == 3]
    assert over and len(over) <= 200 // FORGET + 1  # tried, measured, taken back, and not tried soon again
    assert places.count(2) > 150


def test_a_budget_that_is_exceeded_twice_costs_two_places():
    config = FIVE.model_copy(update={"max_kl": 0.01})
    controller = Controller(config, place=4)
    assert controller.decide(Load(waiting=9, estimated_kl=0.021)).place == 2
    assert controller.decide(Load(waiting=9, estimated_kl=0.006)).place == 3  # the fourth is not known to cost too much
    controller.decide(Load(waiting=9, estimated_kl=0.009))  # new
    assert controller.decide(Load(waiting=9, estimated_kl=0.009)).place == 3


@pytest.mark.parametrize(("miss", "worth"), [(1.001, 1), (1.9, 1), (2, 2), (3.9, 2), (4, 3), (20, 5)])
def test_a_miss_is_worth_places_by_its_size(miss, worth):
    assert places_of(miss) == worth
    controller = Controller(ControlConfig(prices=[i / 100 for i in range(10)], waiting=4), place=2)
    assert controller.decide(Load(waiting=4 * miss)).place == 2 + worth


def test_what_was_too_small_is_enough_for_less_however_long_ago():
    """And it is tried again for as much after a while, one place at a time."""
    controller = Controller(FIVE)
    assert controller.decide(Load(waiting=32, tokens_per_s=100)).place == 4
    for _ in range(2 * FORGET):  # kept, and not low
        assert controller.decide(Load(waiting=3, tokens_per_s=200)).place == 4
    assert [controller.decide(Load(waiting=3, tokens_per_s=70)).place for _ in range(PATIENCE)] == [4, 4, 0]
    assert controller.decide(Load(waiting=32, tokens_per_s=100)).place == 4
    busy = [controller.decide(Load(waiting=0, tokens_per_s=100)).place for _ in range(FORGET + PATIENCE)]
    assert min(busy[:FORGET]) == 1 and busy[-1] == 0


def test_the_busiest_of_the_calm_periods_counts():
    controller = Controller(FIVE)
    controller.decide(Load(waiting=32, tokens_per_s=100))
    rates = (70, 90, 70, 70, 70)
    assert [controller.decide(Load(waiting=0, tokens_per_s=rate)).place for rate in rates] == [4, 4, 3, 3, 3]
    assert controller.decide(Load(waiting=0, tokens_per_s=70)).place == 0


def test_what_is_not_seen_goes_towards_quality():
    controller = Controller(CONFIG, place=3)
    decided = [controller.decide(Load()).place for _ in range(BLIND + 2)]
    assert decided == [3] * (BLIND - 1) + [0] * 3
    assert controller.decide(Load(waiting=5)).place == 1


@pytest.mark.parametrize(
    ("load", "place", "why"),
    [
        (Load(slow_share=0.2, waiting=0), 3, "4.00 of the objective"),
        (Load(slow_share=0.0, waiting=9), 3, "2.25 of the objective"),
        (Load(slow_share=0.04, waiting=3), 1, "0.80 of the objective"),
        (Load(slow_share=0.06), 2, "1.20 of the objective"),
    ],
)
def test_either_objective_counts(load, place, why):
    controller = Controller(ControlConfig(prices=PRICES, waiting=4, token_ms=50), place=1)
    decided = controller.decide(load)
    assert decided.place == place and why in decided.why


def test_a_price_falls_after_a_while_of_calm():
    controller = Controller(CONFIG, place=1)
    assert [controller.decide(Load(waiting=0)).place for _ in range(PATIENCE)] == [1] * (PATIENCE - 1) + [0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prices": [0, 0.01]}, "no objective"),
        ({"prices": [0.01, 0], "waiting": 1}, "prices must rise"),
        ({"prices": [-0.01, 0], "waiting": 1}, "not be negative"),
        ({"prices": [0.01], "waiting": 1}, "at least 2 items"),
        ({"prices": [0, 0.01], "waiting": 0}, "greater than 0"),
        ({"prices": [0, 0.01], "waiting": 1, "mood": 2}, "Extra inputs"),
    ],
)
def test_what_cannot_work_is_refused(given, message):
    with pytest.raises(ValidationError, match=message):
        ControlConfig(**given)
