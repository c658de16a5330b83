"""What a calibration writes and everything else reads."""
