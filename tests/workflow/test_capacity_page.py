"""The tables of the page on capacity are what its commands print."""

import pytest

from tests.capacity_page import made_by, tables

TABLES = tables()


def test_the_page_has_its_models():
    commands = " ".join(command for command, _ in TABLES)
    assert all(f"--model {name} " in commands for name in ("dit-xl-2", "pixart-sigma", "flux", "wan-14b"))
    assert "--tables limits" in commands


@pytest.mark.parametrize(("command", "made"), TABLES, ids=[str(number) for number in range(len(TABLES))])
def test_a_table_is_what_its_command_prints(command, made):
    assert made_by(command) == made, "run `python -m tests.capacity_page`"
