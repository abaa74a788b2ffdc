"""The live half of scaling: what gateways, engines and GPUs say → targets and advice, every few seconds."""

from controlplane.controller.scaling.loop import Scaling

__all__ = ["Scaling"]
