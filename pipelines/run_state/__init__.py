"""What a run keeps: its storage, what can be resumed, and the lease that lets one driver write."""
