"""Which candidates are committed in a step."""
