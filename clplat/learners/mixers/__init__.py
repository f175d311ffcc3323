"""Sequence mixers: `mixer` holds the contract and its laws, every other file one recurrence."""
