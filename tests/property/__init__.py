"""Property tests: hypothesis drives the pure parts against plain models."""
