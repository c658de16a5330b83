"""What needs the Ray Serve application, and HTTP."""
