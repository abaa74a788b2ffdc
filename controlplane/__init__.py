"""tierplane: a control plane for tiers of small language models on vLLM and Ray Serve."""

__version__ = "0.1.0"
