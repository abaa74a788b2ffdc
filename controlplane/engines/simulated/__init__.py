"""The engine `simulated`: a real HTTP server with a token timing model instead of a language model."""
