"""Scorers: each turns the input of a router into one score per expert."""
