"""Keep runs, metrics and the registry of routers in MLflow."""

from harmonica.validation.extras import need

need("mlflow", extra="mlflow")
