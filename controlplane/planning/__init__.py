"""What `plan`, `fit`, `size` and the launch check share: clusters, tiers, and the resources of a replica."""
