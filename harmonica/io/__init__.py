"""Files, local and remote: paths, object stores, the hub, and the safe reading of weights."""
