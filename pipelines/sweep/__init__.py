"""The stage `sweep`: many settings trained, and the Pareto front of them."""
