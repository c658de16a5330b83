"""The environment variables of sere_dist: what they are called, what they mean, and how they are read."""

import hashlib
import logging
import os
from collections.abc import Collection
from pathlib import Path

from packaging.version import Version

ALLOW_UNTESTED_VLLM = "SERE_ALLOW_UNTESTED_VLLM"
NO_OVERLAP = "SERE_NO_OVERLAP"
API_KEY = "SERE_API_KEY"
EXACT_API_KEY = "SERE_EXACT_API_KEY"
ADMIN_TOKEN = "SERE_ADMIN_TOKEN"
FILE = "_FILE"  # The variable of this suffix names a file that holds the secret.
SHORTEST_SECRET = 16  # characters

logger = logging.getLogger("ray.serve")  # the ingress is where secrets are used

# Every variable of sere_dist and its meaning. The reference documentation is generated from this table.
VARIABLES = {
    ALLOW_UNTESTED_VLLM: "Set it to 1 to start on a vLLM release that sere_dist was not tested with.",
    NO_OVERLAP: "Set it to 1 to start each re-routing kernel after the kernel before it has ended. Without it, "
    "GPUs of compute capability 9.0 or higher overlap the two (programmatic dependent launch).",
    API_KEY: "API keys of a serving application. If there are any, every request must carry one of them. "
    "Each line is a key of at least 16 characters.",
    API_KEY + FILE: f"File that holds the keys, instead of {API_KEY}. It is read again when it changes.",
    EXACT_API_KEY: "Further API keys, whose requests are answered without re-routing. They neither change other "
    "requests' answers nor depend on them, unless they ask to `keep` their experts. Each line is a key of at least 16 "
    "characters.",
    EXACT_API_KEY + FILE: f"File that holds these keys, instead of {EXACT_API_KEY}. It is read again when it changes.",
    ADMIN_TOKEN: "Tokens that open /sere/settings, /sere/trial and /sere/control of a serving application, which are "
    "closed without. Each line is a token of at least 16 characters, and no API key. The clients of those routes send "
    "the first.",
    ADMIN_TOKEN + FILE: f"File that holds the tokens, instead of {ADMIN_TOKEN}. It is read again when it changes.",
}

PLUGIN = "sere_dist"  # The name of the entry point that vLLM loads.


def environment_secrets(name: str) -> tuple[str, ...]:
    """Returns the lines of an environment variable, or of the file that `<name>_FILE` names; none if neither is set.

    Several lines are several secrets, each of which is accepted: an old and a new one while they are exchanged.

    Raises:
        ValueError: both are set, the file can't be read, there is no line in it, or one that is easily guessed or typed
            wrongly. The message quotes no secret.
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
    secrets = [line.strip() for line in text.splitlines() if line.strip()]
    if not secrets:
        raise ValueError(f"{given[0]} is set but holds nothing: give it a secret, or unset it")
    for number, secret in enumerate(secrets, start=1):
        if len(secret) < SHORTEST_SECRET or secret.split() != [secret]:
            raise ValueError(
                f"{given[0]}: secret {number} is shorter than {SHORTEST_SECRET} characters, or has white space in it. "
                "Each line is one secret; `openssl rand -hex 16` makes a good one"
            )
    return tuple(secrets)


class Secrets:
    """The secrets of an environment variable, or of a file, which is read again when it has changed.

    Raises:
        ValueError: as `environment_secrets`, at the start. Later, what can't be used leaves the last ones in force.
    """

    def __init__(self, name: str):
        self.name = name
        self._stamp = self._now()
        self._secrets = environment_secrets(name)

    def _now(self) -> tuple[int, ...] | None:
        if (path := os.environ.get(self.name + FILE)) is None:
            return None
        try:
            file = os.stat(path)  # follows the link that Kubernetes exchanges
        except OSError:
            return ()
        return file.st_mtime_ns, file.st_ino, file.st_size

    def __call__(self) -> tuple[str, ...]:
        """Returns those in force."""
        if (stamp := self._now()) != self._stamp:
            self._stamp = stamp
            try:
                self._secrets = environment_secrets(self.name)
                logger.warning("%s%s was read again: %s", self.name, FILE, ", ".join(map(fingerprint, self._secrets)))
            except ValueError as error:
                logger.error("the secrets read before stay in force: %s", error)
        return self._secrets


def fingerprint(secret: str) -> str:
    """Returns what a log may call a secret."""
    return hashlib.sha256(secret.encode()).hexdigest()[:8]


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
