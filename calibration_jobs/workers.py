"""What a cluster has for the tasks of a job."""

import contextlib
from dataclasses import dataclass
from typing import Any, Literal

import ray

from calibration_jobs.job import JobConfig

PATIENCE_SECONDS = 30.0  # without a task that ends, before somebody looks whether any can run


@dataclass(frozen=True)
class Workers:
    """Where the tasks of a job run, and how many at a time."""

    device: Literal["cpu", "cuda"]
    options: dict[str, Any]  # Ray's, of each task

    @classmethod
    def of_cluster(cls, config: JobConfig, may_start: bool = True) -> "Workers":
        """Connects to the cluster, or starts Ray here if it may."""
        with contextlib.suppress(ConnectionError):  # no cluster is up, and none may be started
            ray.init(address=None if may_start else "auto", ignore_reinit_error=True, log_to_driver=False)
        has_gpus = any(resources.get("GPU") for resources in living_nodes())
        device = ("cuda" if has_gpus else "cpu") if config.device == "auto" else config.device
        options: dict[str, Any] = {"num_cpus": config.cpus_per_task if device == "cpu" else 1}
        if gpus := config.gpus_per_task or (1 if device == "cuda" else None):
            options["num_gpus"] = gpus
        if config.accelerator_type:
            options["accelerator_type"] = config.accelerator_type
        if config.memory_per_task:
            options["memory"] = int(config.memory_per_task * 2**30)
        return cls(device, options)

    @property
    def count(self) -> int:
        """Tasks at a time. It changes: nodes come when tasks wait for them, and are lost."""
        return max(1, self.room)

    @property
    def room(self) -> int:
        """Tasks that the living nodes can run at a time, were nothing else to run there."""
        each = {"CPU": self.options["num_cpus"]}
        if "num_gpus" in self.options:
            each["GPU"] = self.options["num_gpus"]
        if "accelerator_type" in self.options:
            each[f"accelerator_type:{self.options['accelerator_type']}"] = 0.001  # what Ray reserves of it
        if "memory" in self.options:
            each["memory"] = self.options["memory"]
        return sum(
            min(int(resources.get(kind, 0) / amount) for kind, amount in each.items()) for resources in living_nodes()
        )

    def wait(self, tasks: list[ray.ObjectRef]) -> ray.ObjectRef:
        """Returns one of these tasks that has ended. Says so if no node has room for any of them."""
        has_told = False
        while True:
            done, _ = ray.wait(tasks, timeout=PATIENCE_SECONDS)
            if done:
                return done[0]
            if not self.room and not has_told:
                has_told = True
                print(
                    f"no node of the cluster has what a task asks for: {self.options}. Waiting for one; if none is to "
                    "come, compare this with `ray status`, and start the job again with other options",
                    flush=True,
                )

    def __str__(self) -> str:
        gpus, kind = self.options.get("num_gpus"), self.options.get("accelerator_type", "GPU")
        each = f"{gpus:g} {kind}" if gpus else f"{self.options['num_cpus']} CPU"
        nodes = len(living_nodes())
        where = f"{nodes} node{'s' * (nodes != 1)}" if ray.is_initialized() else "no cluster"
        return f"{self.count} at a time, {each} each ({where})"


def living_nodes() -> list[dict[str, float]]:
    """Returns the resources of each living node; of none without a cluster."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]] if ray.is_initialized() else []
