"""Ray Serve applications: `serve run serve_apps/FILE.yaml`."""
