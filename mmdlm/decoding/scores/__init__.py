"""The candidate of a position, and its confidence."""
