"""Rewritten logits."""
