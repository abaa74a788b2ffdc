"""Which GPUs of which nodes a gang of workers gets, why not others, and what a change to the cluster would
do."""
