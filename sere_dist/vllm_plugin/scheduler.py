"""vLLM's schedulers with a prefix cache that holds prompts alone: no value of a re-routed row outlives its request."""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler


class PromptCache:
    """Goes before a scheduler class of vLLM. Blocks that hold a token of an answer are offered to no other request."""

    kv_cache_manager: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        coordinator = self.kv_cache_manager.coordinator
        cache_blocks = coordinator.cache_blocks

        def cache_prompt_blocks(request, num_computed_tokens: int) -> None:
            cache_blocks(request, min(num_computed_tokens, request.num_prompt_tokens))

        coordinator.cache_blocks = cache_prompt_blocks


class PromptCacheScheduler(PromptCache, Scheduler):
    pass


class AsyncPromptCacheScheduler(PromptCache, AsyncScheduler):
    pass
