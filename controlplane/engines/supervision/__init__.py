"""Supervision of one engine process: start, readiness, restart with backoff, diagnosis, clean stop."""
