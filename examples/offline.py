"""Re-route in vLLM's offline engine: the plugin loads by its entry point, so there is nothing to import.

    python -m calibration_jobs.calibrate --model examples/tiny_moe/model \\
        --dataset examples/tiny_moe/calibration.parquet --output build/tiny-moe-sere
    python -m examples.offline build/tiny-moe-sere
"""

import sys

from vllm import LLM, SamplingParams

if __name__ == "__main__":  # vLLM starts processes that import this file
    sere = {"artifact": sys.argv[1], "select_top_k": 2}
    llm = LLM("examples/tiny_moe/model", max_model_len=512, enforce_eager=True, additional_config={"sere": sere})
    prompts = ["In the beginning", "sea lion (noun):", ".. function:: sorted("]
    for answer in llm.generate(prompts, SamplingParams(max_tokens=24)):
        print(answer.prompt, answer.outputs[0].text, sep="")
    (worker,) = llm.collective_rpc("sere_counters")
    layer = worker["layers"][0]
    before, after = (layer[f"active_experts_{when}"] / layer["steps"] for when in ("before", "after"))
    print(f"layer 0: {before:.1f} active experts per step before re-routing, {after:.1f} after")
