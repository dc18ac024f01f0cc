"""`harmonica.cli.sample` under the name it had before 0.2."""

import runpy

from harmonica.validation.moved import warn_moved

warn_moved("harmonica.sample", "harmonica.cli.sample")

if __name__ == "__main__":
    runpy.run_module("harmonica.cli.sample", run_name="__main__", alter_sys=True)
