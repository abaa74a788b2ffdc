"""Samples of engines, GPUs and nodes, and the windowed signals made from them: FRESH, STALE or MISSING."""
