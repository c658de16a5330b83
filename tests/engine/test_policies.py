"""One engine follows every policy that `benchmarks.decode` times, and becomes the stock engine again."""

import pytest

from benchmarks.decode import PROMPT, active_experts, engine, step_seconds
from benchmarks.policies import REROUTED, Setting, follow, rerouting_seconds
from examples.tiny_moe.data import HELDOUT, MODEL
from sere_dist.evaluation.protocol import read_texts

pytestmark = pytest.mark.slow
STOCK = Setting("stock")


def test_one_engine_follows_all_policies(artifact_path, projection_path, monkeypatch):
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    from transformers import AutoTokenizer
    from vllm import SamplingParams

    artifacts = {"sere": str(artifact_path), "projection": str(projection_path)}
    prompts = [text.ids[:PROMPT] for text in read_texts(HELDOUT, AutoTokenizer.from_pretrained(MODEL))[:8]]
    sere = {"artifact": str(artifact_path), "select_top_k": 8, "min_rows": 0}
    greedy = SamplingParams(temperature=0, max_tokens=8, detokenize=False)
    tokens, active = {}, {}
    with engine(MODEL, False, 8, load_format="auto", additional_config={"sere": sere}) as llm:
        step_seconds(llm, prompts[:1], 1)  # an engine that is to re-route stops if its first decode step is not
        settings = [Setting("paper", 2), Setting("price", 0.04), Setting("OEA", 2), Setting("top-k", 2)]
        for setting in [STOCK, *settings, Setting("paper", 8, is_off=True), STOCK]:
            llm.collective_rpc(follow, args=(setting.kind, setting.number, artifacts))
            llm.collective_rpc(rerouting_seconds)
            if setting.kind in REROUTED:
                llm.collective_rpc("sere_counters", kwargs={"reset": True})
            assert len(step_seconds(llm, prompts, 4)) == 4
            assert (llm.collective_rpc(rerouting_seconds)[0] > 0) == (setting.kind != "stock")
            if setting.kind in REROUTED:
                active[setting] = active_experts(llm)
            answers = llm.generate([{"prompt_token_ids": ids} for ids in prompts], greedy, use_tqdm=False)
            found = [answer.outputs[0].token_ids for answer in answers]
            assert tokens.setdefault(setting, found) == found, "stock again, other tokens"
    assert tokens[STOCK] == tokens[Setting("paper", 8, is_off=True)]
    others = [tokens[setting] for setting in settings]
    assert all(found != tokens[STOCK] for found in others) and len({str(found) for found in others}) == len(others)
    assert all(after < before for setting, (before, after) in active.items() if not setting.is_off)
