"""Simulated robots with one interface: `reset(seed)`, `step(action)`, `instruction`."""
