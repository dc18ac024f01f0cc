"""The commands of `harmonica`, which need the extra `cli`.

They are `harmonica train`, `sample`, `apply`, `convert` and `memory`, and `check_reference`.
"""

from harmonica.validation.extras import need

for module in ("tyro", "matplotlib", "pyarrow"):
    need(module, extra="cli")
