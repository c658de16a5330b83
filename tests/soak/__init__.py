"""Load for minutes, while things die."""
