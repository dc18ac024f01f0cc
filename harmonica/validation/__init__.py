"""Checks of settings and values, which run before work starts.

The messages of what is refused are made here too.
"""
