"""Keeps one engine process serving: start, readiness, restart with backoff, diagnosis, clean end."""
