"""Checkpoint and restore: CRIU, what it is run from, and what it alone doesn't keep."""
