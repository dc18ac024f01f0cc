"""Run published caching methods over this project's branches, for `compare`."""
