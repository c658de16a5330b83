"""Engines side by side, each in a process of its own, as data-parallel ranks are."""

import os
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack


def data_parallel_ranks(ranks: int) -> list[dict[str, str]]:
    """Returns the environment of each of vLLM's data-parallel ranks on this machine; one rank is an engine alone."""
    from vllm.utils.network_utils import get_open_port  # a GPU machine that times the kernel has no vLLM

    port = str(get_open_port())
    common = {"VLLM_DP_SIZE": str(ranks), "VLLM_DP_MASTER_IP": "127.0.0.1", "VLLM_DP_MASTER_PORT": port}
    common |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    return [{**common, "VLLM_DP_RANK": str(rank), "VLLM_DP_RANK_LOCAL": str(rank)} for rank in range(ranks)]


def run_together(
    commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]], timeout: float
) -> list[str]:
    """Runs commands side by side, each with its own additions to the environment; returns what they printed.

    Raises:
        RuntimeError: one failed; its output is in the message.
        subprocess.TimeoutExpired: one took more than `timeout` seconds.
    """
    with ExitStack() as files:
        running = []
        for command, environment in zip(commands, environments, strict=True):
            # A file: a rank that waits for its pipe to be read would keep the others waiting.
            output = files.enter_context(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=output)
            running.append((process, output))
        printed = []
        for process, output in running:
            failed = process.wait(timeout)
            output.seek(0)
            printed.append(output.read())
            if failed:
                raise RuntimeError(f"a process failed with exit status {failed}:\n{printed[-1]}")
        return printed
