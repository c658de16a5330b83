"""What is abandoned, and what only looks like it."""

import json
import os
import subprocess
import sys
import tempfile

import psutil

from sere_dist.testing.local_cluster import OWNER, PREFIX, end_abandoned

SLEEPS = [sys.executable, "-c", "import time; time.sleep(600)"]


def test_only_what_has_the_token_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (folder := tmp_path / f"{PREFIX}abandoned").mkdir()
    (tmp_path / f"{PREFIX}others").mkdir()
    others = subprocess.Popen(SLEEPS, start_new_session=True)  # its session has the number of the one that was
    ours = subprocess.Popen(SLEEPS, env=os.environ | {"RAY_AUTH_TOKEN": "a-token-of-ours"})
    owner = {"pid": os.getpid(), "started": psutil.Process().create_time() - 1}  # this number was another program's
    (folder / OWNER).write_text(json.dumps(owner | {"token": "a-token-of-ours", "session": others.pid}))
    try:
        assert end_abandoned() == 1
        ours.wait(60)
        assert others.poll() is None
        assert [path.name for path in tmp_path.iterdir()] == [f"{PREFIX}others"]
    finally:
        others.kill()
        others.wait()
