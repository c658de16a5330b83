"""One job at a time on a folder, also where hosts share it over a network.

`flock` does not hold on every network file system, and a process id says nothing on another host. So the holder touches
the lock every few seconds, and whoever finds it watches whether it moves.
"""

import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path

import psutil

BEAT_SECONDS = 2.0
PATIENCE_SECONDS = 15.0  # of whoever finds a lock that does not move, before it is taken for abandoned


class Lock:
    """A file that says who holds it."""

    def __init__(self, path: Path):
        self.path = path
        me = psutil.Process()
        self.holder = {
            "host": socket.gethostname(),
            "namespace": os.stat("/proc/self/ns/pid").st_ino,  # of process ids: containers may have a host's name alike
            "pid": me.pid,
            "started": me.create_time(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
            "id": uuid.uuid4().hex,
        }
        self._left = threading.Event()

    def take(self) -> None:
        """Takes the lock, at once or after the time that it takes to see that its holder is gone.

        Raises:
            ValueError: another job holds it; the message says which.
        """
        while True:
            try:
                with self.path.open("x") as file:
                    json.dump(self.holder, file)
            except FileExistsError:
                self._wait_until_abandoned()
                self.path.unlink(missing_ok=True)
                continue
            if self._holds():
                break
        threading.Thread(target=self._beat, daemon=True).start()

    def _wait_until_abandoned(self) -> None:
        holder = self._read()
        if self._is_dead(holder):
            return
        seen, deadline = self._moved(), time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.2)
            if (now := self._moved()) is None:
                return
            if now != seen:
                who = f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
                raise ValueError(
                    f"{self.path.parent} is another job's ({who}): wait for it or stop it, or choose another --output"
                )

    def _is_dead(self, holder: dict) -> bool:
        """Says whether the holder is known to be gone: only of those whose process id means something here."""
        if any(holder.get(name) != self.holder[name] for name in ("host", "namespace")):
            return False
        try:
            return psutil.Process(holder["pid"]).create_time() != holder["started"]
        except psutil.NoSuchProcess:
            return True

    def _read(self) -> dict:
        try:
            holder = json.loads(self.path.read_text())
        except (OSError, ValueError):  # it is just being written, or was cut off
            return {}
        return holder if isinstance(holder, dict) else {}

    def _holds(self) -> bool:
        return self._read().get("id") == self.holder["id"]

    def _moved(self) -> int | None:
        try:
            return self.path.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _beat(self) -> None:
        while not self._left.wait(BEAT_SECONDS):
            try:
                os.utime(self.path)
            except OSError:  # the network is away, or somebody removed it; the job itself will find out
                continue

    def leave(self) -> None:
        """Gives the lock back; once is enough."""
        if not self._left.is_set():
            self._left.set()
            if self._holds():
                self.path.unlink(missing_ok=True)
