"""What needs neither a cluster nor an engine."""
