"""The method on hardware."""
