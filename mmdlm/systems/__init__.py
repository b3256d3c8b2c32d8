"""One published multimodal system per file: its parts, settings and names."""
