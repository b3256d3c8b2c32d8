"""Which positions are open."""
