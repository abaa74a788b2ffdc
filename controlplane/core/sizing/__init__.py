"""How much memory a model needs on which GPU or CPU, how fast it would be, and the cheapest fleet for a
load."""
