"""What `plan`, `fit`, `size` and the launch check share: clusters, tiers and what each replica needs."""
