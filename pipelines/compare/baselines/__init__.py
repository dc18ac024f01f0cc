"""Published caching methods over this project's branches, as baselines of the stage `compare`."""
