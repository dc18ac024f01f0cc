"""Training of a router.

`trainer` runs SDT (`sdt`) with the image error proxy (`iepo`).
"""
