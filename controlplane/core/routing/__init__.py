"""Where a request goes: tiers, scorers, circuit breakers, dispatch, and retries after a failure."""
