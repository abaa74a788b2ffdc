"""HTTP as this program serves it: its own server, the same handlers under ASGI, server-sent events."""
