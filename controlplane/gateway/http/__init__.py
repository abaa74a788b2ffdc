"""The gateway's own HTTP server, its ASGI twin, and server-sent events."""
