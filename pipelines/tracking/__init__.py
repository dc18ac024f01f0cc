"""MLflow tracking: runs, metrics, and the registry of routers."""

from harmonica.validation.extras import need

need("mlflow", extra="mlflow")
