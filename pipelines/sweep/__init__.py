"""The stage `sweep` trains many settings and finds their Pareto front."""
