"""sere_dist: similarity-based expert re-routing for Mixture-of-Experts models, calibrated on Ray, served by vLLM."""

__version__ = "0.1.0"
