"""On real clusters of several nodes. A package, so that its tests share one."""
