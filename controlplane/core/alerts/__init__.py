"""Alert rules, the signals that they judge, and the alerts that fire."""
