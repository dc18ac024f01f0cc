"""MLflow: runs, metrics, and the registry of routers."""
