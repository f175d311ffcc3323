"""Everything MLflow: runs, store, saved charts, server."""
