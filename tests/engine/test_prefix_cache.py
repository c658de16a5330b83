"""What vLLM's prefix cache hands from one request to the next."""

import pytest
from vllm import LLM, SamplingParams

from examples.tiny_moe.data import MODEL

PROMPT, NEW, BLOCK = 64, 64, 32


@pytest.fixture(scope="module", params=[True, pytest.param(False, marks=pytest.mark.slow)], ids=["exact", "vllm's"])
def exact(request) -> bool:
    return request.param


@pytest.fixture(scope="module")
def llm(exact, artifact_path):
    llm = LLM(
        str(MODEL),
        enforce_eager=True,
        max_model_len=256,
        block_size=BLOCK,
        enable_prefix_caching=True,
        additional_config={"sere": {"artifact": str(artifact_path), "select_top_k": 1, "exact_cache": exact}},
    )
    yield llm
    llm.llm_engine.engine_core.shutdown()


def test_the_next_turn_of_a_conversation(llm, exact, heldout_ids):
    """An exact cache holds the prompt, and the answer is computed again as the model itself does."""

    def ask(ids: list[int], new_tokens: int, **prompt):
        parameters = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, logprobs=5)
        (answer,) = llm.generate([{"prompt_token_ids": ids, **prompt}], parameters, use_tqdm=False)
        (first, *_) = answer.outputs[0].logprobs
        return answer, {token: of.logprob for token, of in first.items()}

    prompt = heldout_ids[0, :PROMPT].tolist()
    answer, _ = ask(prompt, NEW)
    turn = [*prompt, *answer.outputs[0].token_ids, *heldout_ids[1, :8].tolist()]
    next_turn, found = ask(turn, 1)
    _, own = ask(turn, 1, cache_salt="a cache of its own")
    if exact:
        assert next_turn.num_cached_tokens == PROMPT
        assert found == pytest.approx(own, abs=1e-4)
    else:
        assert next_turn.num_cached_tokens > PROMPT
        assert found != pytest.approx(own, abs=1e-2)
