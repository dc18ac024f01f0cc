"""The chain of stages, the state of a run, MLflow and the registry."""
