"""Connect to a Ray cluster, and keep its libraries quiet."""
