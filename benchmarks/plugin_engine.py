"""One engine in a process of its own, for `benchmarks.plugin`: vLLM loads its plugins once a process.

Its argument is JSON: the engine's options, prompts as token ids, how many tokens to answer each with, and turns, each
the changes of the settings to make first. Prints a line that starts with ANSWERS: for every turn the counters and, for
every prompt, the tokens and their leads. A lead is the best token's log-probability less that of the second best.
"""

import json
import sys
from typing import Any

from vllm import LLM, CompletionOutput, SamplingParams

COUNTED = ("steps", "rerouted_slots", "active_experts_before", "active_experts_after")


def lead(logprobs: dict[int, Any]) -> float:
    best, second = sorted((each.logprob for each in logprobs.values()), reverse=True)[:2]
    return round(best - second, 5)


def output_of(output: CompletionOutput) -> dict[str, list]:
    assert output.logprobs is not None  # they were asked for
    return {"tokens": list(output.token_ids), "leads": [lead(logprobs) for logprobs in output.logprobs]}


def counters(llm: LLM) -> dict[str, int]:
    """Returns sums over the layers since the last call."""
    (worker,) = llm.collective_rpc("sere_counters", kwargs={"reset": True})
    return {name: sum(layer[name] for layer in worker["layers"].values()) for name in COUNTED}


def main() -> None:
    options, prompts, new_tokens, turns = json.loads(sys.argv[1])
    reroutes = "additional_config" in options
    if reroutes:
        from sere_dist.vllm_plugin import register

        register()  # as vLLM does by the entry point, which a copy of the repository that is not installed lacks
    llm, answers = LLM(**options), []
    parameters = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, logprobs=2)
    for changes in turns:
        if reroutes:
            llm.collective_rpc("sere_settings", kwargs=changes)
            counters(llm)
        generated = llm.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)
        outputs = [output_of(answer.outputs[0]) for answer in generated]
        answers.append({"outputs": outputs, "counters": counters(llm) if reroutes else {}})
    print("ANSWERS", json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
