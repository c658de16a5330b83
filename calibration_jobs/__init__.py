"""Ray jobs that calibrate: `ray job submit -- python -m calibration_jobs.calibrate ...`."""
