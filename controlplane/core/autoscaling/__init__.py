"""How many replicas each tier should have, inside its bounds and the GPU budget."""
