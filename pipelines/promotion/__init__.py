"""Register and serve routers, and decide which of them becomes the champion."""
