"""What a CUDA worker process imports leaves torch.cuda alone. Checked without a GPU, in a process of its own."""

import json
import subprocess
import sys

# Resolves our worker as vLLM's `init_worker` does, and watches what importing vLLM's CPU worker would replace.
IMPORTS = """
import json, sys
import torch
import vllm.utils.torch_utils as torch_utils
import vllm.v1.worker.gpu.buffer_utils as buffer_utils
import vllm.v1.worker.gpu_worker
from vllm.utils.import_utils import resolve_obj_by_qualname

NAMES = {
    torch: ["Event"],
    torch.cuda: ["Event", "Stream", "current_stream", "set_stream", "stream"],
    torch.accelerator: ["synchronize", "empty_cache", "get_memory_info"],
    torch.Tensor: ["pin_memory", "record_stream"],
    torch_utils: ["async_tensor_h2d"],
    buffer_utils: ["UvaBuffer"],
}

def found():
    return {f"{owner.__name__}.{name}": getattr(owner, name) for owner, names in NAMES.items() for name in names}

before = found()
from sere_dist.vllm_plugin import WORKERS
worker = resolve_obj_by_qualname(WORKERS["vllm.v1.worker.gpu_worker.Worker"])
after = found()
replaced = [name for name in before if before[name] is not after[name]]
cpu_modules = [name for name in sys.modules if name.startswith(("vllm.v1.worker.cpu", "sere_dist.vllm_plugin.cpu"))]
is_gpu_worker = issubclass(worker, vllm.v1.worker.gpu_worker.Worker)
print(json.dumps({"watched": len(before), "is_gpu_worker": is_gpu_worker, "replaced": replaced, "cpu": cpu_modules}))
"""


def test_the_gpu_worker_leaves_cuda_as_torch_made_it():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"watched": 13, "is_gpu_worker": True, "replaced": [], "cpu": []}
