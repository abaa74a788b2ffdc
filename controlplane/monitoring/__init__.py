"""Prometheus rules, alerts and Grafana dashboards, generated from one source.

Queries are built from the metrics that the program exports (:mod:`~controlplane.monitoring.catalog`), so
dashboards and alerts can't name others. ``tierplane monitoring`` writes the files; those in
``k8s/components/monitoring`` are written by ``make monitoring``, and a test checks that they are up to date.
"""
