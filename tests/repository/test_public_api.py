"""The public interface is what `public_api.txt` says; a change of it is a decision, not an accident.

After one: `python -m tests.repository.test_public_api` writes the file anew, and CHANGELOG says what changed.
"""

import inspect
import subprocess
import sys
from pathlib import Path

import harmonica

FROZEN = Path(__file__).parents[1] / "assets" / "public_api.txt"
UPDATE = "if this is meant, run `python -m tests.repository.test_public_api`, and tell users in CHANGELOG.md"


def interface() -> str:
    """Names of `harmonica` with their signatures, a line each, and the public methods of classes."""
    lines = []
    for name in sorted(harmonica.__all__):
        thing = getattr(harmonica, name)
        lines.append(_line(name, thing))
        if inspect.isclass(thing):
            lines += [
                _line(f"{name}.{member}", getattr(thing, member))
                for member, value in sorted(vars(thing).items())
                if not member.startswith("_")
                and (callable(value) or isinstance(value, (classmethod, property)))
            ]
    return "".join(f"{line}\n" for line in lines)


def _line(name: str, thing: object) -> str:
    if isinstance(thing, property):
        return f"{name}: {inspect.signature(thing.fget).return_annotation}"  # type: ignore[arg-type]
    signature = inspect.signature(thing)  # type: ignore[arg-type]
    if hasattr(thing, "__pydantic_config__"):  # a class of settings, whose types are frozen by themselves
        plain = [one.replace(annotation=one.empty) for one in signature.parameters.values()]
        signature = signature.replace(parameters=plain)
    return f"{name}{signature}"


def test_the_public_interface_is_the_frozen_one():
    assert interface() == FROZEN.read_text(), UPDATE


def test_importing_the_package_imports_no_torch(tmp_path):
    """torch's own plug-ins import `harmonica`, so that anything heavier would be a circle."""
    code = "import harmonica as h, sys; print('torch' in sys.modules, set(h.__all__) <= set(dir(h)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "False True\n", done.stderr


if __name__ == "__main__":
    FROZEN.write_text(interface())
