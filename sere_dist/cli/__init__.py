"""The command `sere-dist`."""
