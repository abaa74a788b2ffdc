"""Reports on a window of time, per tier and endpoint, from samples."""
