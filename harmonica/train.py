"""`harmonica.cli.train` under the name it had before 0.2."""

import runpy

from harmonica.validation.moved import warn_moved

warn_moved("harmonica.train", "harmonica.cli.train")

if __name__ == "__main__":
    runpy.run_module("harmonica.cli.train", run_name="__main__", alter_sys=True)
