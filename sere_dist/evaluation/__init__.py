"""What re-routing costs in quality, measured as batched decoding would meet it."""
