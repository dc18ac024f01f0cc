"""Prompts: where they are kept, how they are embedded, and how labels and prompts become conditions."""
