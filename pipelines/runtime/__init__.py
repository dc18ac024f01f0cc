"""The connection to a Ray cluster, and how quiet its libraries are."""
