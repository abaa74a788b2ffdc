"""Alert rules, the signals that they evaluate, and the alerts that are pending or firing."""
