"""Settings and values that are checked before work starts, and the messages of what is refused."""
