"""Simulated robots behind one interface: `reset(seed)`, `step(action)`, `instruction`."""
