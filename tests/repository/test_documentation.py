"""Every file, module and name that a page, a docstring or a message mentions exists."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import harmonica

ROOT = Path(__file__).parents[2]
PACKAGES = ("harmonica", "pipelines", "cluster", "tests", "docs")
PAGES = sorted(
    path
    for folder in (ROOT, ROOT / ".github", *(ROOT / name for name in PACKAGES))
    for path in (folder.glob("*.md") if folder == ROOT else folder.rglob("*.md"))
    if path.is_file()
)
SOURCES = [ROOT / "workflow.py", *(path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py")))]

# Names under `harmonica.` that are tags in MLflow.
TAGS = {"harmonica.workers", "harmonica.gate"}

RELEASED = {"train_router.py", "models/router_models.py"}


@cache
def prose_of(path: Path) -> tuple[str, ...]:
    """A page; of a source file its comments and its strings, docstrings among them."""
    text = path.read_text()
    if path.suffix == ".md":
        return (text,)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = tuple(token.string for token in tokens if token.type == tokenize.COMMENT)
    nodes = [node.value for node in ast.walk(tree_of(path)) if isinstance(node, ast.Constant)]
    return comments + tuple(value for value in nodes if isinstance(value, str))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def code_spans(text: str) -> Iterator[str]:
    """What stands between backticks, on one line or folded onto the next."""
    for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text):
        yield re.sub(r"\s+", " ", span)


@cache
def names_in(path: Path) -> frozenset[str]:
    """What a module defines or imports at its top level, and what its classes define."""
    found: set[str] = set()
    for node in tree_of(path).body:
        for inner in (node, *(node.body if isinstance(node, ast.If) else ())):
            if isinstance(inner, ast.Import | ast.ImportFrom):
                found |= {(alias.asname or alias.name) for alias in inner.names}
            elif isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(inner.name)
            elif isinstance(inner, ast.Assign | ast.AnnAssign):
                targets = inner.targets if isinstance(inner, ast.Assign) else [inner.target]
                found |= {name.id for one in targets for name in ast.walk(one) if isinstance(name, ast.Name)}
    return frozenset(found)


def exists(dotted: str) -> bool:
    """Whether a dotted name is a module of ours, or something in one."""
    parts = dotted.split(".")
    if parts[0] == "harmonica_ray":  # as the wheel calls it
        parts[0] = "pipelines"
    for length in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:length])
        module = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if place.is_dir() and length == len(parts):
            return True
        if module.is_file():
            return length == len(parts) or parts[length] in names_in(module) or parts[length] == "__getattr__"
    return False


def where(path: Path) -> str:
    return str(path.relative_to(ROOT))


def pages_and_sources() -> list[Path]:
    return [*PAGES, *(path for path in SOURCES if path.name != Path(__file__).name)]


def test_every_file_that_is_named_exists():
    missing = []
    names = {path.name for name in PACKAGES for path in (ROOT / name).rglob("*")}
    names |= {path.name for path in (*ROOT.iterdir(), *(ROOT / ".github").iterdir())}
    for path in pages_and_sources():
        for text in prose_of(path):
            for span in code_spans(text):
                is_ours = re.fullmatch(rf"({'|'.join(PACKAGES)}|\.github|\.ci)(/[\w.-]+)+/?", span)
                if is_ours and not (ROOT / span).exists():
                    missing.append(f"{where(path)}: {span}")
                bare = re.fullmatch(r"[\w-]+\.(py|md|yaml|toml)", span)
                if bare and span not in names | RELEASED:
                    missing.append(f"{where(path)}: {span}")
            if path.suffix == ".md":
                links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
                missing += [f"{where(path)}: {link}" for link in links if not (path.parent / link).exists()]
                for name, section in re.findall(r'^--8<-- "([^":]+):(\S+)"$', text, re.MULTILINE):
                    source = ROOT / name
                    if not source.is_file() or f"--8<-- [start:{section}]" not in source.read_text():
                        missing.append(f"{where(path)}: {name}:{section}")
    assert not missing, "\n".join(sorted(set(missing)))


def test_every_module_and_name_that_is_mentioned_exists():
    missing = []
    for path in pages_and_sources():
        for text in prose_of(path):
            mentioned = [
                match[0].rstrip(".")
                for span in code_spans(text)
                for match in re.finditer(
                    r"(?<![\w./-])(harmonica|harmonica_ray|pipelines|tests)(\.\w+)+", span
                )
            ]
            mentioned += [
                match[1] for match in re.finditer(r"-m ((?:harmonica|pipelines|tests)[\w.]*\w)", text)
            ]
            mentioned += re.findall(r"^::: (\S+)", text, re.MULTILINE)  # a page of the Python API
            for name in mentioned:
                known = name.startswith("harmonica.") and name.split(".")[1] in harmonica.__all__
                if not (known or name in TAGS or exists(name)):
                    missing.append(f"{where(path)}: {name}")
    assert not missing, "\n".join(sorted(set(missing)))


def test_every_import_of_an_example_works():
    missing = []
    for page in PAGES:
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
                    names = [f"{node.module}.{alias.name}" for alias in node.names]
                    missing += [f"{where(page)}: {name}" for name in names if not exists(name)]
    assert not missing, "\n".join(sorted(set(missing)))
