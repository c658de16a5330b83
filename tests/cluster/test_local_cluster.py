import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from sere_dist.testing.local_cluster import LocalCluster, end_abandoned


@pytest.mark.slow
def test_stops_every_process_that_it_started():
    with LocalCluster(num_cpus=1) as cluster:
        task = "import ray; ray.init(log_to_driver=False); print(ray.get(ray.remote(lambda: 6 * 7).remote()))"
        done = cluster.run(["python", "-c", task], capture_output=True, text=True)
        assert done.stdout.strip() == "42"
        running = cluster.processes()
        titles = [" ".join(process.cmdline()) for process in running]
        for part in ("raylet", "gcs_server", "ray::DashboardAgent", "ray::RuntimeEnvAgent"):
            assert any(part in title for title in titles), f"{part} would be left behind"
    assert not [process for process in running if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not cluster.folder.exists()


ABANDONS = """
import signal
from sere_dist.testing.local_cluster import LocalCluster
cluster = LocalCluster(num_cpus=1).__enter__()
print(*(process.pid for process in cluster.processes()), flush=True)
signal.pause()
"""


@pytest.mark.slow
def test_what_a_killed_program_left_is_found_and_ended(monkeypatch):
    # A folder of its own, as other tests start clusters too, which would end it; Ray's sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="s-") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        check_what_a_killed_program_left(Path(folder))


def check_what_a_killed_program_left(folder):
    with subprocess.Popen([sys.executable, "-c", ABANDONS], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        left = [psutil.Process(int(pid)) for pid in program.stdout.readline().split()]
        assert len(left) > 2 and end_abandoned() == 0, "its program is alive"
        program.kill()
    assert all(process.is_running() for process in left)
    assert end_abandoned() == 1
    assert not [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not list(folder.glob("sere-*"))
