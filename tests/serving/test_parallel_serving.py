"""The example model behind Ray Serve on two workers that hold half of the experts each: as one replica under tensor
parallelism, and as a gang of two replicas under data-parallel attention. Behind an API key."""

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from examples import demo
from examples.tiny_moe.data import example_texts
from sere_dist.admin import request_settings
from sere_dist.environment import ADMIN_TOKEN, API_KEY
from sere_dist.testing.local_cluster import free_ports
from tests.soak.survival import processes
from tests.support.metrics import eventually, metrics

PARALLEL = {"TP2+EP2": {"tensor_parallel_size": 2}, "DP2+EP2": {"data_parallel_size": 2}}


@pytest.fixture(scope="module")
def key_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("secrets") / "keys"
    path.write_text("old-key\nnew-key\n")
    return path


@pytest.fixture(scope="module", params=PARALLEL)
def url(request, cluster, artifact_path, key_file):
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    ingress_environment = {"runtime_env": {"env_vars": {f"{API_KEY}_FILE": str(key_file)}}}
    with demo.served(
        cluster,
        free_ports(1)[0],
        artifact_path,
        key="old-key",
        expert_parallel=True,
        environment=environment,
        require_api_key=True,
        ingress={"num_replicas": 1, "ray_actor_options": ingress_environment},
        **PARALLEL[request.param],
    ) as url:
        yield url


def test_every_rank_answers_and_reroutes(cluster, url, monkeypatch):
    """Over HTTP; the counters are what Prometheus reads."""
    prompts = example_texts("heldout.parquet", 24, 16).tolist()
    monkeypatch.setenv(ADMIN_TOKEN, cluster.environment[ADMIN_TOKEN])
    changed = request_settings(url, {"select_top_k": 3})
    assert changed["pending"] == []
    with openai.OpenAI(base_url=url, api_key="new-key") as client, ThreadPoolExecutor(len(prompts)) as pool:

        def answer(prompt: list[int]) -> int:
            done = client.completions.create(
                model=demo.MODEL_ID, prompt=prompt, max_tokens=16, extra_body={"ignore_eos": True}
            )
            return done.usage.completion_tokens

        assert list(pool.map(answer, prompts)) == [16] * len(prompts)

    def every_rank_rerouted() -> bool:
        found = [metrics(cluster, replica=replica, rank=rank) for replica in changed["replicas"] for rank in "01"]
        ranks = [each for each in found if each]
        rerouted = [value for rank in ranks for name, value in rank.items() if "rerouted_slots" in name]
        return len(ranks) == 2 and len(rerouted) == 2 and min(rerouted) > 0

    eventually(every_rank_rerouted)


def test_without_a_key_there_is_no_answer(url):
    for key in ("none", "old"):
        with openai.OpenAI(base_url=url, api_key=key) as client, pytest.raises(openai.AuthenticationError):
            client.completions.create(model=demo.MODEL_ID, prompt="In the beginning")


def test_a_group_that_loses_a_worker_comes_back(cluster, url):
    """The last test of each group: every process of it is another one afterwards."""
    workers = {process.pid for process in processes(cluster, "VLLM::Worker")}
    assert len(workers) == 2
    processes(cluster, "VLLM::Worker")[-1].kill()
    with openai.OpenAI(base_url=url, api_key="new-key", max_retries=0, timeout=30) as client:

        def answers_again() -> bool:
            now = {process.pid for process in processes(cluster, "VLLM::Worker")}
            return not workers & now and bool(
                client.completions.create(model=demo.MODEL_ID, prompt="In the beginning", max_tokens=8).choices
            )

        eventually(answers_again, seconds=demo.READY_SECONDS)
