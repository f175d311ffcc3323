"""The Hydra configuration of clplat; this file makes it a package that `pkg://` can read."""
