"""The agent on each node: samples its GPUs, CPUs, memory and disk."""
