"""The environment variables of sere_dist: what they are called, what they mean, and how they are read."""

import os
from collections.abc import Collection
from pathlib import Path

from packaging.version import Version

ALLOW_UNTESTED_VLLM = "SERE_ALLOW_UNTESTED_VLLM"
NO_OVERLAP = "SERE_NO_OVERLAP"
API_KEY = "SERE_API_KEY"
ADMIN_TOKEN = "SERE_ADMIN_TOKEN"
FILE = "_FILE"  # The variable of this suffix names a file that holds the secret.

# Every variable of sere_dist and its meaning. The reference documentation is generated from this table.
VARIABLES = {
    ALLOW_UNTESTED_VLLM: "Set it to 1 to start on a vLLM release that sere_dist was not tested with.",
    NO_OVERLAP: "Set it to 1 to start each re-routing kernel after the kernel before it has ended. Without it, "
    "GPUs of compute capability 9.0 or higher overlap the two (programmatic dependent launch).",
    API_KEY: "API keys of a serving application. If there are any, every request must carry one of them. "
    "Separate several keys by white space.",
    API_KEY + FILE: f"File that holds the API keys, instead of {API_KEY}.",
    ADMIN_TOKEN: "Tokens that open the route /sere/settings of a serving application, which is closed without one. "
    "Separate several tokens by white space. The clients of that route send the first.",
    ADMIN_TOKEN + FILE: f"File that holds the admin tokens, instead of {ADMIN_TOKEN}.",
}

PLUGIN = "sere_dist"  # The name of the entry point that vLLM loads.


def environment_secrets(name: str) -> tuple[str, ...]:
    """Returns the words of an environment variable, or of the file that `<name>_FILE` names; none if neither is set.

    Several words are several secrets, each of which is accepted: an old and a new one while they are exchanged.

    Raises:
        ValueError: both are set, the file can't be read, or there is no word in it.
    """
    file_name = name + FILE
    given = [variable for variable in (name, file_name) if variable in os.environ]
    if not given:
        return ()
    if len(given) > 1:
        raise ValueError(f"{name} and {file_name} are both set: unset one of them")
    text = os.environ[given[0]]
    if given[0] == file_name:
        try:
            text = Path(text).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file_name}: {text} can't be read: {error}") from error
    if not text.split():
        raise ValueError(f"{given[0]} is set but holds nothing: give it a secret, or unset it")
    return tuple(text.split())


def is_tested_release(version: str, tested: Collection[str]) -> bool:
    """Says whether a version is one of those tested. A local part, as in 0.32.0+cu129, is another build of the same."""
    return Version(version).public in tested


def environment_flag(name: str) -> bool:
    """Returns whether an environment variable is 1. Unset and 0 are False.

    Raises:
        ValueError: it is set to anything else.
    """
    value = os.environ.get(name, "0")
    if value not in ("0", "1"):
        raise ValueError(f"{name} must be 0 or 1, not {value!r}")
    return value == "1"


def plugin_is_disabled(vllm_plugins: str | None) -> bool:
    """Returns whether this value of `VLLM_PLUGINS` keeps vLLM from loading the plugin, which vLLM does not report."""
    return vllm_plugins is not None and PLUGIN not in vllm_plugins.split(",")
