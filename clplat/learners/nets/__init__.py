"""Networks: `net` holds the contract, every other file one architecture."""
