"""What the configuration asks of each tier, and the snapshot of the cluster that gateways work from."""
