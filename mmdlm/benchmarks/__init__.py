"""Scores and speeds: the command behind every number we print."""
