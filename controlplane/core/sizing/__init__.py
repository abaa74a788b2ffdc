"""How much memory a model needs on a GPU or CPU, how fast it would be, and the cheapest fleet for an expected
load."""
