"""The stage `sweep`: train many settings and find their Pareto front."""
