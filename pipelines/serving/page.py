"""Answer the endpoint's own page, at its root, and its documentation."""

from importlib import resources

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse

# The page is one file: nothing else may be loaded by it, and nobody may frame it.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# The documentation asks for keys, and its scripts are from elsewhere: one release of them, which does not
# change by itself as `@5` would, and which sends requests to this endpoint alone.
_SWAGGER = "https://cdn.jsdelivr.net/npm/swagger-ui-dist@5.17.14/"
_SWAGGER_POLICY = (
    f"default-src 'none'; script-src 'unsafe-inline' {_SWAGGER}; style-src 'unsafe-inline' {_SWAGGER}; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def add_page(app: FastAPI) -> None:
    """Answer `GET /` with the page, which generates images in a browser."""
    page = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"content-security-policy": _POLICY})


def add_documentation(app: FastAPI) -> None:
    """Answer `GET /docs` with Swagger's page on the endpoint's OpenAPI document."""

    @app.get("/docs", include_in_schema=False)
    async def documentation(request: Request) -> HTMLResponse:
        answer = get_swagger_ui_html(
            openapi_url=f"{request.scope.get('root_path', '').rstrip('/')}{app.openapi_url}",
            title=app.title,
            swagger_js_url=f"{_SWAGGER}swagger-ui-bundle.js",
            swagger_css_url=f"{_SWAGGER}swagger-ui.css",
            swagger_favicon_url="data:,",
        )
        answer.headers["content-security-policy"] = _SWAGGER_POLICY
        return answer
