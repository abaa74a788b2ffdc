"""What ``serve run`` imports: tierplane as one Ray Serve application."""
