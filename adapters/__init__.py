"""Adapters, codecs and heads, one per file; nothing is imported here."""
