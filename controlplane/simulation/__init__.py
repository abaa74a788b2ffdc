"""A fleet under a virtual clock: production code for routing, admission, placement and scaling, simulated
engines.

:mod:`.traces` reads arrivals, :mod:`.scenario_builder` makes a :mod:`.scenario` from a configuration, and
:mod:`.simulator` runs it with one of :mod:`.policies`. A :mod:`.tier` has a :mod:`.fleet` of replicas on a
:mod:`.cluster`. :mod:`.results` has what comes out, and :mod:`.plot` draws it. simulation.md describes what
is modelled and how accurate it is.
"""
