"""Commands that plan: what fits, where it would run, what it would cost."""
