"""The live half of scaling: from counters and engine readings to targets and recommendations."""

from controlplane.controller.scaling.scaler import PlaneScaler

__all__ = ["PlaneScaler"]
