"""The command line, one file per group of commands; the entry point is `main.py`."""
