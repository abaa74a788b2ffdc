"""What gateways count, and the demand per tier that the controller derives from it."""
