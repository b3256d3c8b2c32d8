"""Commands that measure the quality and latency of a model."""
