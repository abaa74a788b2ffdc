"""The bounded queue in front of full tiers, fair between callers, by priority."""
