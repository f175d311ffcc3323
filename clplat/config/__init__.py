"""Configurations: what is refused before anything is built, and what a run that goes on may change."""
