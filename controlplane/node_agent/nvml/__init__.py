"""Reads this machine's GPUs through NVIDIA's management library (NVML)."""
