"""Stores of past examples, what goes into them, and what stands in for them."""
