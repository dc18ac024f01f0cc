"""What README showed before the modules moved still works for a release, and says where they are now."""

import runpy
import sys

import pytest

IMPORTS = [
    ("harmonica.artifact", "harmonica.core.artifact", "RouterArtifact"),
    ("harmonica.sampling", "harmonica.core.sampling", "sample"),
]
COMMANDS = [
    ("harmonica.train", "harmonica.cli.train"),
    ("harmonica.sample", "harmonica.cli.sample"),
    ("harmonica.convert", "harmonica.cli.convert"),
    ("harmonica.memory", "harmonica.cli.memory"),
    ("harmonica.reference", "harmonica.cli.check_reference"),
]


@pytest.mark.parametrize(("old", "new", "name"), IMPORTS)
def test_an_old_import_gives_the_same_object_and_a_warning(monkeypatch, old, new, name):
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(FutureWarning, match=f"{old} is now {new}: use that name") as warned:
        found: dict = {}
        exec(f"from {old} import {name}\nfrom {new} import {name} as now", found)
    assert found[name] is found["now"]
    assert warned[0].filename == "<string>", "the caller's line, not ours"


@pytest.mark.parametrize(("old", "new"), COMMANDS)
def test_an_old_command_does_the_same_with_a_warning(monkeypatch, capsys, old, new):
    monkeypatch.delitem(sys.modules, old, raising=False)
    monkeypatch.setattr(sys, "argv", [old, "--help"])
    with pytest.warns(FutureWarning, match=f"{old} is now {new}"), pytest.raises(SystemExit) as ended:
        runpy.run_module(old, run_name="__main__")
    assert ended.value.code in (0, None)
    assert "--help" in capsys.readouterr().out
