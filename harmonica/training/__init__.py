"""How a router is trained: `trainer` runs SDT (`sdt`) with the image-error proxy (`iepo`)."""
