"""The package, its commands, its pages and the files around it."""
