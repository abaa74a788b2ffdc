"""HTTP: a server of our own, the same handlers under ASGI, server-sent events, and a bounded GET."""
