"""The counters of gateways, and the demand per tier that the controller derives from them."""
