"""A fleet under a virtual clock: the production routing, admission and scaling code, fake engines.

:mod:`.traces` reads arrivals, :mod:`.scenario` turns a configuration into tiers, :mod:`.simulator` runs them,
:mod:`.baselines` holds other scaling policies to compare with, :mod:`.results` what came out and :mod:`.plot`
the pictures. See simulation.md for what is modelled and how far it can be trusted.
"""
