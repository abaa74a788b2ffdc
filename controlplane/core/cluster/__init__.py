"""What the controller knows about each tier, and the cluster snapshot that the gateways use."""
