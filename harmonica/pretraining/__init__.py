"""Training of the built-in models, which is an example.

It needs a clone, and is not part of the installed package.
"""
