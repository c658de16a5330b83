"""A Ray worker's set-up hook: it may take 160 MB beyond what it has once everything is imported."""

import resource
from pathlib import Path

EXTRA = 160 * 2**20


def limit() -> None:
    import calibration_jobs.calibrate
    import calibration_jobs.trials  # noqa: F401

    status = Path("/proc/self/status").read_text()
    now = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (now + EXTRA, now + EXTRA))
