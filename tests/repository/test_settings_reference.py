"""Options are frozen, and the reference of settings is what the code says."""

import pytest

from tests.settings_reference import COMMANDS, OPTIONS, PAGE, frozen, options, page

UPDATE = (
    "options have changed: if this is meant, run `python -m tests.settings_reference` and tell users in "
    "CHANGELOG.md; an option that goes needs an error that names what takes its place"
)


def test_the_options_are_the_frozen_ones():
    now, before = set(frozen().splitlines()), set(OPTIONS.read_text().splitlines())
    assert (sorted(now - before), sorted(before - now)) == ([], []), UPDATE


def test_the_reference_is_up_to_date():
    assert page() == PAGE.read_text(), "run `python -m tests.settings_reference`"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command):
    assert [one.name for one in options(COMMANDS[command]) if not one.explanation] == []
