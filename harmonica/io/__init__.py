"""Local and remote files: paths, object stores, the hub, and the safe reading of weights."""
