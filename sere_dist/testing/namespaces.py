"""Network namespaces: hosts with a network of their own, on this machine."""

import contextlib
import secrets
import subprocess

import psutil


def ip(*arguments: str) -> str:
    """Runs iproute2's `ip`, and returns what it printed.

    Raises:
        OSError: it failed, or is not installed.
    """
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def can_be_made() -> bool:
    """Whether this process may make network namespaces: as root, where iproute2 is installed."""
    name = f"sere-{secrets.token_hex(3)}"
    try:
        ip("netns", "add", name)
        ip("netns", "delete", name)
    except OSError:
        return False
    return True


def processes_of(namespace: str) -> list[psutil.Process]:
    """Returns what runs in a namespace; nothing where there is no such namespace."""
    found = []
    with contextlib.suppress(OSError):
        for pid in ip("netns", "pids", namespace).split():
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(pid)))
    return found
