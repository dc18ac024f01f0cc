"""MkDocs hook: adds the pages that are made from other files, and follows links that leave the pages.

A page may link to any file of the repository by its relative path, as on a forge, such as
`../../harmonica/core/plan.py` from `concepts.md`. On the site a picture is copied, a page of `PUBLISHED` is
linked where it is published, and any other file gets a page that shows its text.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from http_api import describe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = Path(__file__).resolve().parent / "pages"
PUBLISHED = {
    "experiments.md": "tests/benchmarks/RESULTS.md",
    "operations/cluster-files.md": "cluster/README.md",
    "reference/settings.md": "pipelines/config/SETTINGS.md",
}
"""Page of the site -> the file in the repository that is its only source.

While that is missing, a page of the same name among the pages stands in."""
HTTP_API = "reference/http-api.md"
"""Generated from the endpoint; the page of that name among the pages only says so."""
_LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)(?=(?:#[^)\s]*)?\))")
_PICTURES = (".png", ".svg")
_HIDDEN = "---\nsearch:\n  exclude: true\n---\n\n"


def target_of(link: str, folder: Path) -> Path | None:
    """Return the file of the repository that a link names, or None for a link within the pages."""
    path = (folder / link).resolve()
    if path.is_relative_to(PAGES) or not path.is_relative_to(ROOT) or not path.is_file():
        return None
    return path.relative_to(ROOT)


def uri_of(path: Path) -> str:
    """Return where the site has a file of the repository."""
    for uri, source in PUBLISHED.items():
        if source == str(path):
            return uri
    return f"repository/{path}" if path.suffix in _PICTURES else f"repository/{path}.md"


def source_of(uri: str) -> Path:
    """Return the file that a page is made from."""
    published = ROOT / PUBLISHED[uri] if uri in PUBLISHED else None
    return published if published and published.is_file() else PAGES / uri


def _replace(files: Files, file: File) -> None:
    if (stand_in := files.get_file_from_path(file.src_uri)) is not None:
        files.remove(stand_in)
    files.append(file)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add published files, the HTTP API, and whatever else the pages link to."""
    texts = {file.src_uri: file.content_string for file in files.documentation_pages()}
    for uri in PUBLISHED:
        if source_of(uri) != PAGES / uri:
            texts[uri] = source_of(uri).read_text()
            _replace(files, File.generated(config, uri, content=texts[uri]))
    _replace(files, File.generated(config, HTTP_API, content=describe()))
    linked = {
        target
        for uri, text in texts.items()
        for link in _LINK.findall(text)
        if (target := target_of(link, source_of(uri).parent)) is not None
    }
    for path in sorted(linked):
        uri = uri_of(path)
        if uri in PUBLISHED:
            continue
        if path.suffix in _PICTURES:
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
            continue
        language = {".py": "python", ".yaml": "yaml", ".json": "json"}.get(path.suffix, "text")
        text = f"{_HIDDEN}# `{path}`\n\n````{language}\n{(ROOT / path).read_text()}````\n"
        files.append(File.generated(config, uri, content=text, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Point links that leave the pages to where the site has their files."""
    uri = page.file.src_uri
    if uri.startswith("repository/"):
        return markdown
    folder = source_of(uri).parent

    def rewrite(match: re.Match[str]) -> str:
        target = target_of(match[1], folder)
        return match[1] if target is None else posixpath.relpath(uri_of(target), posixpath.dirname(uri))

    return _LINK.sub(rewrite, markdown)
