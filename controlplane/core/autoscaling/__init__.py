"""How many replicas each tier should have, within the GPUs that there are."""
