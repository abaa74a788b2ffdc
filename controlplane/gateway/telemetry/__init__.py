"""What a gateway counts: Prometheus metrics, traces, traffic for the controller, usage."""
