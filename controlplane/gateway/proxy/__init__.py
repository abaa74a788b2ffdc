"""A request's way to an engine and back: dispatch, attempts, relay, time-outs, resumed streams."""
