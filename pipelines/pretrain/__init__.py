"""The built-in models are trained here on Ray, as an example.

It needs a clone, since the wheel leaves it out.
"""
