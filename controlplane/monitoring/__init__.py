"""Prometheus rules, alerts and Grafana dashboards, generated from one source.

Queries are built from the metrics that the program exports (:mod:`~controlplane.monitoring.catalog`), so a
dashboard or an alert can't name any other. ``tierplane monitoring`` writes the files; those in
``k8s/components/monitoring`` are written by ``make monitoring``, and a test checks that they are up to date.
"""
