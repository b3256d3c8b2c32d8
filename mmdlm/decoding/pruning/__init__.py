"""Decoding strategies that leave media tokens out, of some layers or of the rest of a decode."""
