"""Who may do what: roles, API keys, and the principal that a request comes from."""
