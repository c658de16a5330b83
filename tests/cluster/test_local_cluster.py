import psutil
import pytest

from sere_dist.testing.local_cluster import LocalCluster


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
