"""The commands `harmonica train`, `sample`, `apply`, `convert` and `memory`, and `check_reference`."""

from harmonica.validation.extras import need

for module in ("tyro", "matplotlib", "pyarrow"):
    need(module, extra="cli")
