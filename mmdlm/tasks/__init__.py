"""What people ask of a model: one verb per file."""
