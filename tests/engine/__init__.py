"""What needs vLLM's engine."""
