"""Metrics, and the cost of replacing layers on held-out text."""
