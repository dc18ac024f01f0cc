"""Whom the stage `compare` puts HarmoniCa beside, and its picture."""
