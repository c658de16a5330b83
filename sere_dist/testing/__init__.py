"""What tests, studies and the demo share: random steps, and a Ray cluster of this machine's own."""
