"""The GPUs of the cluster: health, cordons, and leases of exact GPUs to replicas."""
