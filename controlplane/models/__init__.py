"""Resolves a tier's model to files that an engine can load and an architecture for the memory model."""
