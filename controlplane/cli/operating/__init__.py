"""Commands for operators of a running plane."""
