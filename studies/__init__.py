"""Experiments on quality and traffic. Each writes one JSON file and one figure."""
