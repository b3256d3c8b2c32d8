"""Search over several decodes of one prompt."""
