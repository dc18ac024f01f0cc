"""Answer the endpoint's own page, at its root."""

from importlib import resources

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

# The page is one file: nothing else may be loaded by it, and nobody may frame it.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def add_page(app: FastAPI) -> None:
    """Answer `GET /` with the page, which generates images in a browser."""
    page = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"content-security-policy": _POLICY})
