"""The controller: the registry of endpoints, the control loops, the store, and the actor that runs them."""
