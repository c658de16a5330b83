"""Similarity-based expert re-routing for Mixture-of-Experts models, calibrated on Ray and served with vLLM.

The names in `__all__` are this package's interface. They are imported when they are first used: vLLM imports this
package in every process that it starts.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sere_dist.artifact.folder import Artifact
    from sere_dist.config import ReroutingConfig
    from sere_dist.method.projection import reroute_projection
    from sere_dist.method.rerouting import reroute
    from sere_dist.method.similarity import expert_projection, expert_similarity

__version__ = "0.1.0"
__all__ = ["Artifact", "ReroutingConfig", "expert_projection", "expert_similarity", "reroute", "reroute_projection"]

_MODULES = {
    "Artifact": "artifact.folder",
    "ReroutingConfig": "config",
    "expert_projection": "method.similarity",
    "expert_similarity": "method.similarity",
    "reroute": "method.rerouting",
    "reroute_projection": "method.projection",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
