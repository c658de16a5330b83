"""The names that others may import, and what importing them does not load."""

import subprocess
import sys

import pytest

import sere_dist

IMPORTS = """
import sys
from sere_dist import Artifact, ReroutingConfig, expert_projection, expert_similarity, reroute, reroute_projection
import torch
loaded = [name for name in ("vllm", "ray", "cuda.core") if name in sys.modules]
assert not loaded, loaded
assert not torch.cuda.is_initialized()
"""
METHOD = """
import sys
import sere_dist.method.cka, sere_dist.method.counters, sere_dist.method.placement, sere_dist.method.projection
import sere_dist.method.rerouting, sere_dist.method.similarity
others = {name.split(".")[0] for name in sys.modules} & {"pydantic", "transformers", "safetensors", "ray", "vllm"}
assert not others, others
"""
NOTHING = "import sys, sere_dist, sere_dist.config; assert 'torch' not in sys.modules"


@pytest.mark.long
@pytest.mark.parametrize("program", [IMPORTS, METHOD, NOTHING], ids=["interface", "method", "settings"])
def test_what_an_import_loads(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_names():
    assert all(callable(getattr(sere_dist, name)) for name in sere_dist.__all__)
    with pytest.raises(AttributeError, match="module 'sere_dist' has no attribute 'rerout'"):
        sere_dist.rerout  # noqa: B018
