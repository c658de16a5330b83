"""An engine that never heard of sere_dist, in a process of its own: vLLM loads its plugins once a process.

VLLM_PLUGINS= python -m tests.stock_engine '{"enforce_eager": true}' '[[1, 2, 3]]' 16
prints the greedy tokens of each prompt as the last line, in JSON.
"""

import json
import sys

from vllm import LLM, SamplingParams

if __name__ == "__main__":
    options, prompts, new_tokens = map(json.loads, sys.argv[1:])
    answers = LLM(**options).generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True),
    )
    assert "sere_dist.vllm_plugin" not in sys.modules
    print(json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))
