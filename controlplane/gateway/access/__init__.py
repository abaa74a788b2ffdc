"""Checks who a request comes from, and what it may use."""
