"""The HTTP endpoint, in process and on Ray Serve."""
