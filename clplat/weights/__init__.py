"""Snapshots of weights, and algebra on them."""
