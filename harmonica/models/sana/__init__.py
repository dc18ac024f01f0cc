"""Sana as a list of branches."""
