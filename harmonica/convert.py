"""`harmonica.cli.convert` under the name it had before 0.2."""

import runpy

from harmonica.validation.moved import warn_moved

warn_moved("harmonica.convert", "harmonica.cli.convert")

if __name__ == "__main__":
    runpy.run_module("harmonica.cli.convert", run_name="__main__", alter_sys=True)
