"""Samples of engines, GPUs and nodes, and the windowed signals made of them, each FRESH, STALE or MISSING."""
