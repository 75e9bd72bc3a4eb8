"""Grafana dashboards, Prometheus rules and manifests, with their generator."""
