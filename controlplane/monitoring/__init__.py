"""Prometheus rules, alerts and Grafana dashboards, from one source that knows which metrics there are.

A query is built from a metric that the program exports (:mod:`~controlplane.monitoring.catalog`), so a
dashboard or an alert that names any other does not come into being. ``tierplane monitoring`` writes the
files; those in ``k8s/components/monitoring`` are written by ``make monitoring`` and kept by a test.
"""
