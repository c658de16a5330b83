"""Engines in processes of their own: vLLM loads its plugins once a process, and a data-parallel rank is a process.

`run` starts one with what it is to do as JSON, and returns what it answered.
"""

import json
import os
import sys
from typing import Any

from sere_dist.testing.processes import data_parallel_ranks, run_together

PATIENCE = 900  # seconds, for two engines that start side by side on a throttled machine


def run(
    options: dict[str, Any],
    prompts: list[list[int]],
    new_tokens: int,
    turns: list[dict[str, Any]],
    env: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Starts an engine, lets it answer all prompts once each turn, and returns tokens and counters of every turn.

    A turn holds changes of the settings; `pretend` and `kernel` are arguments of `engine_spy`'s functions of these
    names, `only` are the places of the prompts to answer, if not all, and `lengths` the tokens to answer each with, if
    not `new_tokens`.
    """
    (answers,) = run_data_parallel(options, prompts, new_tokens, turns, ranks=1, env=env)
    return answers


def run_data_parallel(
    options: dict[str, Any],
    prompts: list[list[int]],
    new_tokens: int,
    turns: list[dict[str, Any]],
    ranks: int = 2,
    env: dict[str, str] | None = None,
) -> list[list[dict[str, Any]]]:
    """The same by several data-parallel ranks, which share the prompts out in order. Returns the answers of each."""
    share, commands = len(prompts) // ranks, []
    for rank in range(ranks):
        mine = slice(rank * share, (rank + 1) * share)
        my_turns = [turn | ({"lengths": turn["lengths"][mine]} if "lengths" in turn else {}) for turn in turns]
        work = json.dumps([options, prompts[mine], new_tokens, my_turns])
        commands.append([sys.executable, "-m", "tests.support.engines", work])
    environments = [{**each, **(env or {})} for each in data_parallel_ranks(ranks)]
    return [
        json.loads(next(line for line in output.splitlines() if line.startswith("ANSWERS ")).split(" ", 1)[1])
        for output in run_together(commands, environments, timeout=PATIENCE)
    ]


def main() -> None:
    from vllm import LLM, SamplingParams

    from tests.support import engine_spy

    options, prompts, new_tokens, turns = json.loads(sys.argv[1])
    llm = LLM(**options)
    answers = []
    for turn in turns:
        reroutes = "additional_config" in options
        changes = dict(turn)
        chosen = changes.pop("only", range(len(prompts)))
        lengths = changes.pop("lengths", [new_tokens] * len(prompts))
        for name in ("pretend", "kernel"):
            if name in changes:
                llm.collective_rpc(getattr(engine_spy, name), args=tuple(changes.pop(name)))
        if changes:
            llm.collective_rpc("sere_settings", kwargs=changes)
        if reroutes:
            llm.collective_rpc("sere_counters", kwargs={"reset": True})
        parameters = [SamplingParams(temperature=0, max_tokens=lengths[i], ignore_eos=True) for i in chosen]
        generated = llm.generate([{"prompt_token_ids": prompts[i]} for i in chosen], parameters, use_tqdm=False)
        tokens = [list(answer.outputs[0].token_ids) for answer in generated]
        answers.append({"tokens": tokens, "counters": llm.collective_rpc("sere_counters") if reroutes else []})
    if not reroutes and os.environ.get("VLLM_PLUGINS") == "":
        assert "sere_dist.vllm_plugin" not in sys.modules
    print("ANSWERS", json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
