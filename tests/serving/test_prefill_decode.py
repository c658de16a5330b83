"""`serve_apps/tiny_moe_pd.yaml`: prompts are computed in a pool of their own, and only the decode pool is re-routed."""

import openai
import pytest

from examples.tiny_moe.data import MODEL, MODEL_ID, example_texts
from sere_dist.admin import request_settings
from sere_dist.environment import ADMIN_TOKEN
from tests.support import engines
from tests.support.metrics import metrics
from tests.support.polling import eventually

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("url", ["two pools"], indirect=True)]
PROMPT, NEW = 80, 24  # a prompt has two blocks to send, and a rest


def test_only_the_decode_pool_is_rerouted(cluster, url, pools, monkeypatch):
    """Off, its tokens are those of one engine that does both; what it is sent are the exact keys and values."""
    monkeypatch.setenv(ADMIN_TOKEN, cluster.environment[ADMIN_TOKEN])
    prompts = example_texts("heldout.parquet", PROMPT, 4).tolist()
    shared = {name: of for name, of in pools["engine"].items() if name != "kv_transfer_config"}
    alone = [{"only": [place]} for place in range(len(prompts))]
    options = {"model": str(MODEL), **shared}
    stock = [turn["tokens"][0] for turn in engines.run(options, prompts, NEW, alone, env={"VLLM_PLUGINS": ""})]
    with openai.OpenAI(base_url=url, api_key="none") as client:

        def greedy() -> list[list[int]]:
            options = {"model": MODEL_ID, "max_tokens": NEW, "temperature": 0}
            extra = {"ignore_eos": True, "return_token_ids": True}
            answers = [client.completions.create(prompt=prompt, extra_body=extra, **options) for prompt in prompts]
            return [answer.choices[0].token_ids for answer in answers]

        (replica,) = request_settings(url)["replicas"]
        rerouted = greedy()
        assert request_settings(url, {"enabled": False})["pending"] == []
        assert greedy() == stock != rerouted
        assert [tokens[0] for tokens in rerouted] == [tokens[0] for tokens in stock]  # by the prompt's last token

    def counted() -> bool:
        received = metrics(cluster, prefix="ray_vllm_external_prefix_cache_hits", ReplicaId=replica)
        rerouted = metrics(cluster, deployment="LLMServer:tiny-moe").get("ray_sere_rerouted_slots_total", 0)
        return sum(received.values()) >= 2 * len(prompts) * 64 and rerouted > 0

    eventually(counted)
    assert not metrics(cluster, deployment="Prefill:tiny-moe")
