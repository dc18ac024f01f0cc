"""The state of a run: its storage, its progress, and the lease that lets one driver write."""
