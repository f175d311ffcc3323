"""Nets with weights of their own for each task: generated, masked, or copied."""
