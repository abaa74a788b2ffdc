"""From observed state to commands: migrations, restarts, holds, and how many replicas Serve is to run."""
