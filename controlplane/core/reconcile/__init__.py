"""From the observed state to commands: migrations, restarts, holds, and the number of replicas for Serve."""
