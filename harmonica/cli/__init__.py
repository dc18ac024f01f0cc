"""The commands: `python -m harmonica.cli.train`, `sample`, `convert`, `memory` and `check_reference`."""
