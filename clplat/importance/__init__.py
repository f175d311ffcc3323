"""Which weights matter for the past, and penalties that hold them."""
