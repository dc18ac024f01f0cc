"""`harmonica.cli.check_reference` under the name it had before 0.2."""

import runpy

from harmonica.validation.moved import warn_moved

warn_moved("harmonica.reference", "harmonica.cli.check_reference")

if __name__ == "__main__":
    runpy.run_module("harmonica.cli.check_reference", run_name="__main__", alter_sys=True)
