"""Which positions are recomputed, and which keys and values are reused."""
