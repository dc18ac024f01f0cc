"""What the stage `compare` puts this project's routers beside, how it measures them, and its picture."""
