"""From what a tier calls its model to files and an architecture that engines and the memory model
understand."""
