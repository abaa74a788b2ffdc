"""Who may do what, and how much of it: roles, API keys, and the principal that a request comes from."""
