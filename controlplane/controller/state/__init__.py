"""The parts of the controller's state; only :mod:`controlplane.controller.controller` uses them."""
