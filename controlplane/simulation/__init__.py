"""Simulates a fleet under a virtual clock: simulated engines, and production code for routing, admission,
placement and scaling.

:mod:`.traces` reads arrivals, :mod:`.scenario_builder` makes a :mod:`.scenario` from a configuration, and
:mod:`.simulator` runs it with one of :mod:`.policies`. A :mod:`.tier` has a :mod:`.fleet` of replicas on a
:mod:`.cluster`. :mod:`.results` has the results, and :mod:`.plot` draws them. simulation.md describes the
models and their accuracy."""
