"""A pool of actors that survives the loss of any of them.

Unlike `ray.util.ActorPool` it grows as nodes come, shrinks as they are lost, and does a lost actor's work again.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import ray
from ray.actor import ActorClass, ActorHandle
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from calibration_jobs.workers import Workers

DEATHS = 5  # of actors at one call, before the pool gives up
FAILURES = 3  # of actors to start, one after the other
PATIENCE_SECONDS = 60.0  # without any actor, before the pool says what it waits for
POLL_SECONDS = 10.0  # after which the pool looks again how many actors there is room for


class ActorPool:
    """As many actors of a class as the cluster has room for: more as nodes come, fewer as they are lost."""

    def __init__(self, actor_class: ActorClass, workers: Workers, *arguments: Any):
        """Every actor is made with the same arguments, which go into the object store once."""
        self.workers = workers
        # Ray's own annotation allows for a class instead of a handle.
        make = actor_class.options(max_restarts=0, **workers.options).remote
        self.make = cast(Callable[..., ActorHandle], make)
        self.arguments = [ray.put(argument) for argument in arguments]
        self.idle: list[ActorHandle] = []
        self.starting: dict[ray.ObjectRef, ActorHandle] = {}
        self.failures = 0  # to start, one after the other

    def __enter__(self) -> "ActorPool":
        return self

    def __exit__(self, *_exception: object) -> None:
        for actor in [*self.idle, *self.starting.values()]:
            ray.kill(actor)

    def run(self, calls: Mapping[str, tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """Yields (key, value) as they come, for calls {key: (method, argument)}.

        What an actor was doing when it died is done again by another.

        Raises:
            RayActorError, OutOfMemoryError: actors died again and again.
            Exception: a call raised it.
        """
        waiting, deaths = list(calls), dict.fromkeys(calls, 0)
        since, has_told = time.monotonic(), False
        running: dict[ray.ObjectRef, tuple[str, ActorHandle]] = {}
        try:
            while waiting or running:
                self._start(len(waiting) + len(running), len(running))
                while waiting and self.idle:
                    key, actor = waiting.pop(0), self.idle.pop()
                    method, argument = calls[key]
                    running[getattr(actor, method).remote(argument)] = key, actor
                done, _ = ray.wait([*running, *self.starting], timeout=POLL_SECONDS)
                if not running and not self.idle and not has_told and time.monotonic() - since > PATIENCE_SECONDS:
                    has_told = True
                    print(f"still waiting for a first worker with {self.workers.options} to start", flush=True)
                for reference in done:
                    if reference in self.starting:
                        self._admit(reference)
                        continue
                    key, actor = running.pop(reference)
                    try:
                        value = ray.get(reference)
                    except RayTaskError as error:  # the call's own error: it would fail again
                        raise error.cause from error
                    except (RayActorError, OutOfMemoryError) as error:
                        deaths[key] += 1
                        if deaths[key] >= DEATHS:
                            raise
                        print(f"lost a worker ({type(error).__name__}); what it did is done again", flush=True)
                        waiting.insert(0, key)
                        self._forget_the_dead()  # of the same node, say
                        continue
                    self.idle.append(actor)
                    yield key, value
        finally:
            self.idle += [actor for _key, actor in running.values()]

    def _start(self, num_calls: int, num_running: int) -> None:
        """Starts actors for calls, of which some run already."""
        # One more than there is room for asks an autoscaler for it.
        most = min(self.workers.count + 1, num_calls)
        while len(self.idle) + len(self.starting) + num_running < most:
            actor = self.make(*self.arguments)
            self.starting[actor.__ray_ready__.remote()] = actor

    def _admit(self, reference: ray.ObjectRef) -> None:
        """Takes an actor that has started into the pool, or says why it died."""
        actor = self.starting.pop(reference)
        try:
            ray.get(reference)
        except (RayActorError, OutOfMemoryError) as error:
            # A node that is lost takes several with it, and another may come; what fails by itself will fail again.
            self.failures += isinstance(error, OutOfMemoryError) or getattr(error, "actor_init_failed", False)
            if self.failures >= FAILURES:
                raise
            print(f"a worker died while it started ({type(error).__name__}); another is started", flush=True)
            return
        self.failures = 0
        self.idle.append(actor)

    def _forget_the_dead(self) -> None:
        asked: dict[ray.ObjectRef, ActorHandle] = {actor.__ray_ready__.remote(): actor for actor in self.idle}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=POLL_SECONDS) if asked else ([], [])
        self.idle = []
        for reference in answered:
            with contextlib.suppress(RayActorError, OutOfMemoryError):
                ray.get(reference)
                self.idle.append(asked[reference])
