"""From the observed state to commands: migrations, restarts, holds, and the replica targets for Serve."""
