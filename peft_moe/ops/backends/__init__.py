"""Backends: each computes the same mixture in its own way."""
