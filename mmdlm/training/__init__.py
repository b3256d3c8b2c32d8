"""Training with Lightning: one module, one data module."""
