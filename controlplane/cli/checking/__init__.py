"""Commands that check a machine or a configuration file."""
