"""Commands that check the machine or a configuration file."""
