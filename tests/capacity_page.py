"""Write the tables of docs/pages/operations/capacity.md anew, each by the command above it.

python -m tests.capacity_page
"""

import contextlib
import io
import re
import shlex
from pathlib import Path

from pipelines.capacity.__main__ import main

PAGE = Path(__file__).parents[1] / "docs/pages/operations/capacity.md"
_NAME = "python -m pipelines.capacity "
BLOCK = re.compile(rf"```bash\n({re.escape(_NAME)}.*?)\n```\n\n<!-- made -->\n(.*?)<!-- end -->", re.DOTALL)


def arguments_of(command: str) -> list[str]:
    return shlex.split(command.replace("\\\n", " ").removeprefix(_NAME))


def made_by(command: str) -> str:
    """What the command prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(arguments_of(command)) == 0
    return printed.getvalue().strip() + "\n"


def tables() -> list[tuple[str, str]]:
    """Each command of the page, and the tables under it."""
    return [(command, made.strip() + "\n") for command, made in BLOCK.findall(PAGE.read_text())]


def write() -> None:
    def renew(found: re.Match[str]) -> str:
        return f"```bash\n{found[1]}\n```\n\n<!-- made -->\n\n{made_by(found[1])}\n<!-- end -->"

    PAGE.write_text(BLOCK.sub(renew, PAGE.read_text()))


if __name__ == "__main__":
    write()
