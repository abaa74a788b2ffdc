"""A fleet under a virtual clock: the production routing, admission and scaling code, fake engines.

:mod:`.traces` reads arrivals, :mod:`.scenario` turns a configuration into tiers, :mod:`.simulator` runs them,
:mod:`.fleet` and :mod:`.cluster` hold replicas and their places, :mod:`.policies` the scaling policies,
:mod:`.results` what came out and :mod:`.plot` the pictures. See simulation.md for what is modelled and how
far it can be trusted.
"""
