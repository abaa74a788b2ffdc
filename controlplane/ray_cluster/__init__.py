"""A Ray cluster of our own on this machine, and the plane that runs on it as seen from outside."""
