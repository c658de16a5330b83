"""Random decode steps, re-routed by the kernels and by the torch functions: they must agree to the bit.

Used by the tests, on a CPU (tests/support/cuda_on_host.h), and by `python -m benchmarks.kernel`, on a GPU.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch

from sere_dist.kernels.reroute import ID_DTYPES, DeviceSettings, LayerKernel
from sere_dist.method.counters import COUNTERS, count_step
from sere_dist.method.fixed_point import ALWAYS_PRIMARY, FIXED_POINT_ONE
from sere_dist.method.projection import in_force, primary_losses, reroute_projection, worth_running
from sere_dist.method.records import ExpertPlaces, LayerTables, Settings, Step
from sere_dist.method.rerouting import replace_experts, substitutes
from sere_dist.method.slots import fill_dropped, merge_repeats


@dataclass
class RandomStep:
    """One step of one layer: T `rows` of K = `top_k` slots; all tensors, on the CPU, follow from the seed.

    Attributes:
        domains: number of domains that experts live in; None: no domains.
        ranks: number of ranks that hold the experts; 0: one holds all, and is not named.
        elsewhere_share: of the experts, those that must be primary for other ranks; None: there are no other ranks.
        valid_share: of the rows; None: no mask.
        runs_share: of the rows, valid or not, those whose experts run all the same; None: no mask.
        ties: weights and similarities have few values.
        most_alike: the largest similarity. Some are below 0.
        empty_share: of the slots, with id -1.
    """

    seed: int
    rows: int
    top_k: int
    experts: int
    select_top_k: int
    projection: bool
    threshold: float = 0.0
    expert_price: float = 0.0
    traffic_price: float = 0.0
    balance_price: float = 0.0
    domains: int | None = None
    ranks: int = 0
    elsewhere_share: float | None = None
    has_home: bool = False
    has_chance: bool = False
    merges: bool = False
    enabled: bool = True
    min_rows: int = 0
    max_rows: int | None = None
    valid_share: float | None = 0.7
    runs_share: float | None = None
    ties: bool = True
    most_alike: float = 1.0
    empty_share: float = 0.1
    id_dtype: torch.dtype = torch.int32

    def __post_init__(self):
        random = torch.Generator().manual_seed(self.seed)

        def uniform(*shape: int, values: int = 4) -> torch.Tensor:
            drawn = torch.rand(shape, generator=random)
            return (drawn * values).round() / values if self.ties else drawn

        rows, experts = self.rows, self.experts
        self.weights_TK = uniform(rows, self.top_k)
        ids_TK = torch.randint(experts, (rows, self.top_k), generator=random)
        empty_TK = torch.rand(rows, self.top_k, generator=random) < self.empty_share
        self.ids_TK = ids_TK.masked_fill(empty_TK, -1).to(self.id_dtype)
        similarity_EE = uniform(experts, experts, values=8)
        self.similarity_EE = (similarity_EE - 0.125) / 0.875 * self.most_alike
        self.coefficient_EE, self.size_E = 2 * uniform(experts, experts), 2 * uniform(experts)
        self.valid_T = self.domain_E = self.home_T = self.chance_T = self.runs_T = self.rank_E = self.elsewhere_E = None
        longer = rows + 5  # as a runner's buffers are
        if self.valid_share is not None:
            self.valid_T = torch.rand(longer, generator=random) < self.valid_share
        if self.domains:
            self.domain_E = torch.randint(self.domains, (experts,), generator=random)
        if self.domains and self.has_home:
            self.home_T = torch.randint(-1, self.domains, (longer,), generator=random, dtype=torch.int32)
        if self.has_chance:
            self.chance_T = uniform(longer)
        if self.runs_share is not None:
            self.runs_T = torch.rand(longer, generator=random) < self.runs_share
        if self.ranks:
            self.rank_E = torch.randint(self.ranks, (experts,), generator=random)
        if self.elsewhere_share is not None:
            heaviest_E = torch.rand(experts, generator=random) < self.elsewhere_share
            losses_E = (uniform(experts) / 4 * FIXED_POINT_ONE).long()
            self.elsewhere_E = losses_E.masked_fill(heaviest_E, ALWAYS_PRIMARY)

    @property
    def step(self) -> Step:
        """The step as the functions of `method` take it: masks cut to its rows."""
        return Step(self.weights_TK, self.ids_TK, *(None if mask is None else mask[: self.rows] for mask in self.masks))

    @property
    def masks(self) -> tuple[torch.Tensor | None, ...]:
        """Those of the step as a runner has them: longer than its rows."""
        return self.valid_T, self.home_T, self.chance_T, self.runs_T

    @property
    def tables(self) -> LayerTables:
        if not self.projection:
            return LayerTables(self.similarity_EE)
        return LayerTables(self.similarity_EE, self.coefficient_EE, self.size_E)

    @property
    def places(self) -> ExpertPlaces:
        return ExpertPlaces(self.rank_E, self.ranks, self.domain_E)

    @property
    def settings(self) -> Settings:
        """Those that the user set; prices are policy projection's alone."""
        prices = (self.expert_price, self.traffic_price, self.balance_price) if self.projection else ()
        return Settings(self.select_top_k, self.threshold, *prices)

    @property
    def settings_in_force(self) -> Settings:
        """The same with S = -1 where the switch or the gates leave the step alone."""
        valid_T = self.step.valid_T
        rows = self.rows if valid_T is None else int(valid_T.sum())
        most = rows if self.max_rows is None else self.max_rows
        is_on = self.enabled and self.min_rows <= rows <= most
        return self.settings if is_on else self.settings._replace(select_top_k=-1)

    def by_torch(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns weights, ids and counts by the functions of `method`."""
        step, tables, settings = self.step, self.tables, self.settings_in_force
        losses_E = primary_losses(step, tables, settings, self.places)
        if self.elsewhere_E is not None and in_force(settings, self.top_k, self.places):
            losses_E = losses_E + self.elsewhere_E
        primary_E = worth_running(losses_E, tables, settings, self.places)
        if self.projection:
            weights_TK, ids_TK = reroute_projection(step, tables, settings, self.places, primary_E)
        else:
            substitute_E = substitutes(self.similarity_EE, primary_E, self.threshold)
            weights_TK, ids_TK = self.weights_TK, replace_experts(self.ids_TK, substitute_E, step.valid_T)
        if not self.merges:
            counts = count_step(step, ids_TK, primary_E, self.places, tables=tables)
            return weights_TK, fill_dropped(step, ids_TK), counts
        merged_weights_TK, merged_ids_TK = weights_TK, ids_TK
        if primary_E.any():  # else re-routing is off
            merged_weights_TK, merged_ids_TK = merge_repeats(weights_TK, ids_TK, step.valid_T)
        counts = count_step(step, ids_TK, primary_E, self.places, merged_ids_TK, tables)
        return merged_weights_TK, merged_ids_TK, counts

    def own_losses(self) -> torch.Tensor:
        """Returns int64 [E]: this rank's say in what is primary, whether or not it then acts."""
        return primary_losses(self.step, self.tables, self.settings, self.places)

    def by_cpu(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the same by `kernels.reroute_cpu`."""
        from sere_dist.kernels.reroute_cpu import CpuLayer  # needs Numba, which a machine with a GPU may lack

        layer = CpuLayer(self.tables, self.places, merges=self.merges)
        layer.set(self.settings, enabled=self.enabled, min_rows=self.min_rows, max_rows=self.max_rows)

        def all_reduce(losses_E: torch.Tensor) -> None:
            assert self.elsewhere_E is not None  # else nobody is asked
            offered = self.own_losses() if self.enabled else torch.zeros_like(losses_E)
            assert torch.equal(losses_E, offered), "other ranks got other losses"
            losses_E += self.elsewhere_E

        step = Step(self.weights_TK, self.ids_TK, *self.masks)
        weights_TK, ids_TK = layer.reroute(step, None if self.elsewhere_E is None else all_reduce)
        return weights_TK, ids_TK, layer.counters

    def layer(self, device: torch.device | str) -> LayerKernel:
        """Returns the layer of this step, with settings of its own."""
        settings = DeviceSettings(device)
        self.set(settings)
        return LayerKernel(self.tables, settings, self.places, threshold=self.threshold, merges=self.merges)

    def set(self, settings: DeviceSettings) -> None:
        settings.set(self.settings, enabled=self.enabled, min_rows=self.min_rows, max_rows=self.max_rows)

    def by_kernel(self, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the same by the kernel, on the CPU again."""
        layer = self.layer(device)
        weights_TK, ids_TK = self.weights_TK.clone().to(device), self.ids_TK.clone().to(device)
        masks = [None if mask is None else mask.to(device) for mask in self.masks]
        offered = []

        def all_reduce(losses_E: torch.Tensor) -> None:
            assert self.elsewhere_E is not None  # else nobody is asked
            offered.append(losses_E.clone().cpu())
            losses_E += self.elsewhere_E.to(losses_E)

        layer.reroute(Step(weights_TK, ids_TK, *masks), None if self.elsewhere_E is None else all_reduce)
        if self.elsewhere_E is not None:
            (own,) = offered
            same = torch.equal(*(losses_E.clamp(max=ALWAYS_PRIMARY) for losses_E in (own, self.own_losses())))
            assert same, "other ranks got other losses"
        assert not layer.workspace.any(), "the workspace was not left as it was found"
        return weights_TK.cpu(), ids_TK.cpu(), layer.counters.cpu()

    def check(self, device: torch.device | str) -> None:
        """Raises AssertionError, with the first difference, unless kernel and torch agree to the bit."""
        assert_equal(self.by_kernel(device), self.by_torch(), self)


def assert_equal(kernels: tuple[torch.Tensor, ...], torchs: tuple[torch.Tensor, ...], what: object) -> None:
    for name, mine, expected in zip(("weights", "ids", "counts"), kernels, torchs, strict=True):
        different = (mine != expected).nonzero().tolist()
        if not different:
            continue
        first = tuple(different[0])
        place = [*COUNTERS, *(f"rank {rank}" for rank in range(len(mine)))][first[0]] if name == "counts" else first
        raise AssertionError(
            f"{len(different)} of {mine.numel()} {name} differ, the first at {place}: kernel {mine[first].item()}, "
            f"torch {expected[first].item()}, in {what}"
        )


# What a random step is drawn from: all kinds, the common ones more often.
CHOICES: dict[str, Sequence[Any]] = {
    "rows": [0, 1, 2, 5, 16, 33, 80],
    "top_k": [1, 2, 3, 4, 6, 8, 10, 32],
    "experts": [1, 2, 8, 31, 33, 60, 64, 128, 256, 300],
    "select_top_k": [-1, 0, 0, 1, 1, 2, 2, 3, 4, 6, 8, 9],
    "projection": [False, True],
    "threshold": [0.0, 0.3, 0.75, 0.95, 1.0],
    "expert_price": [0.0, 0.0, 0.0, 1e-9, 0.0625, 0.125, 0.25, 0.5, 2.0, 1e6],
    "traffic_price": [0.0, 0.01, 0.125, 0.25, 0.25, 3.0],
    "balance_price": [0.0, 0.0, 0.01, 0.25, 1.0, 1e6],
    "domains": [None, 1, 2, 8, 8, 70],
    "ranks": [0, 0, 1, 3, 8, 70],
    "elsewhere_share": [None] * 4 + [0.0, 0.1, 0.5],
    "has_home": [False, True],
    "has_chance": [False, True],
    "merges": [False, True],
    "enabled": [True] * 9 + [False],
    "min_rows": [0] * 6 + [5, 20],
    "max_rows": [None] * 6 + [5, 20],
    "valid_share": [None, None, 0.0, 0.3, 0.9, 0.9],
    "runs_share": [None, None, 0.0, 0.1, 0.5],
    "ties": [False, True],
    "most_alike": [1.0, 1.0, 0.5, 0.1],
    "empty_share": [0.0, 0.1, 0.9],
    "id_dtype": ID_DTYPES,
}


def random_steps(count: int, seed: int = 0) -> Iterator[RandomStep]:
    random = Random(seed)
    for _ in range(count):
        drawn = {name: random.choice(values) for name, values in CHOICES.items()}
        yield RandomStep(seed=random.randrange(2**31), **drawn)
