"""The REST interface: an HTTP relay that picks an endpoint, keeps its promises and hides failures."""
