"""The one transformer, its key/value buffers, and one file per published family."""
