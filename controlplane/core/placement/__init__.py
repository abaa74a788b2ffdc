"""Which GPUs of which nodes a gang of workers gets, with the reasons, and the effect of a change to the
cluster."""
