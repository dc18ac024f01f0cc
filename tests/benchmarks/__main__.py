"""Run every comparison, print the table, write `bench.json` in the current folder.

Exit code 0 whether or not the aims hold: a busy machine must not fail a build.
"""

import dataclasses
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks.method import BENCHMARKS
from tests.benchmarks.timing import Row, describe_machine


def make_table(rows: list[Row]) -> Table:
    """One line a comparison."""
    machine = ", ".join(f"{name} {value}" for name, value in describe_machine().items())
    table = Table("what", "arms: median (spread)", "value", "aim", "holds", caption=machine)
    for row in rows:
        arms = "\n".join(f"{name}: {t.median_s:.3f} s ({t.spread_s:.3f})" for name, t in row.arms.items())
        table.add_row(row.what, arms, f"{row.value:.3f} {row.unit}", row.aim, "yes" if row.holds else "no")
    return table


def main() -> None:
    """All comparisons, in order."""
    rows = [row for benchmark in BENCHMARKS for row in benchmark()]
    Path("bench.json").write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    Console().print(make_table(rows))


if __name__ == "__main__":
    main()
