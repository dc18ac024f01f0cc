"""The page at `/`: one file that loads nothing else, and draws what the endpoint draws."""

import re
import shutil
from importlib import resources

import pytest
from fastapi.testclient import TestClient
from live_app import running
from tiny_dit import make_artifact, write_model
from tiny_engine import make_engine

from harmonica.models.loading import load_model
from pipelines.serving.images_api import create_app

# Root in a container has no user namespaces to build the sandbox of; the others keep it off the network.
FLAGS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--no-first-run"]


@pytest.fixture(scope="module")
def engine_parts(tmp_path_factory):
    model = write_model(tmp_path_factory.mktemp("model"))
    return load_model(model), make_artifact(model)


def test_the_page_is_served_and_may_load_nothing_else(engine_parts):
    with TestClient(create_app(make_engine(*engine_parts))) as client:
        answer = client.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert answer.text == resources.files("pipelines.serving").joinpath("page.html").read_text()


def test_the_page_refers_to_nothing_outside():
    page = resources.files("pipelines.serving").joinpath("page.html").read_text()
    assert re.findall(r"(?:https?:)?//[a-z]", page.replace("http-equiv", "")) == []
    assert re.findall(r"<(?:script|img|iframe)[^>]*\bsrc=|@import|url\(", page) == []
    assert re.findall(r"""<link[^>]*href="([^"]*)""", page) == ["data:,"]
    assert len(page.encode()) < 20_000, "small"
    assert 'name="viewport"' in page


def test_the_documentation_loads_one_release_and_sends_to_this_endpoint_alone(engine_parts):
    with TestClient(create_app(make_engine(*engine_parts), keys=("key",)), root_path="/images") as client:
        answer = client.get("/images/docs")
    assert answer.status_code == 200 and "url: '/images/openapi.json'" in answer.text
    loaded = re.findall(r"""(?:src|href)="([^"]*)""", answer.text)
    assert "data:," in loaded and len(loaded) == 3
    policy = answer.headers["content-security-policy"]
    for url in loaded:
        assert url == "data:," or re.search(r"/swagger-ui-dist@\d+\.\d+\.\d+/", url), "no range of releases"
        assert url == "data:," or url.rpartition("/")[0] in policy
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no chromium here: apt-get install chromium")
    with playwright.sync_playwright() as running_playwright:
        started = running_playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield started
        started.close()


WATCH = """() => {
  window.seen = {rows: [], pictures: []};
  const map = document.getElementById("map"), drawImage = CanvasRenderingContext2D.prototype.drawImage;
  new MutationObserver(records => records.forEach(record => seen.rows.push(record.oldValue)))
    .observe(map, {attributeFilter: ["data-row"], attributeOldValue: true});
  CanvasRenderingContext2D.prototype.drawImage = function (...given) {
    drawImage.apply(this, given);
    if (this.canvas.id === "full") seen.pictures.push(this.canvas.toDataURL());
  };
}"""
"""Keeps every row and picture that the page shows, however briefly: each event of a stream is shown."""


@pytest.mark.browser
@pytest.mark.parametrize("width", [1100, 360])
def test_full_and_cached_are_drawn_side_by_side(engine_parts, browser, width, tmp_path):
    with running(create_app(make_engine(*engine_parts))) as url:
        page = browser.new_page(viewport={"width": width, "height": 800})
        complaints = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
        page.goto(url)
        page.wait_for_selector("#draw:not([disabled])")
        assert page.locator("#class option").count() == 10
        page.select_option("#class", label="Sneaker")
        page.fill("#seed", "7")
        assert page.input_value("#steps") == "8", "as many as the router has"
        page.fill("#steps", "12")
        page.evaluate(WATCH)
        page.click("#draw")
        page.wait_for_selector("#draw:not([disabled])")
        seen = page.evaluate("seen")
        assert set(seen["rows"]) == {*map(str, range(8)), ""}, "the current step moves over the router"
        assert len(set(seen["pictures"])) == len(seen["pictures"]) == 3 + 1, "previews, and then the image"
        assert "as fast" in page.inner_text("#speedup")
        assert "dB" in page.inner_text("#difference-note")
        assert "router 3" in page.inner_text("#cached-note") and "12 steps" in page.inner_text("#full-note")
        assert page.evaluate("document.getElementById('full').width") == 28
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (
            "no sideways scroll"
        )
        page.screenshot(path=str(tmp_path / f"page-{width}.png"))
        assert complaints == []


@pytest.mark.browser
def test_a_key_is_asked_for_where_one_is_needed(engine_parts, browser):
    with running(create_app(make_engine(*engine_parts), keys=("secret",))) as url:
        page = browser.new_page()
        page.goto(url)
        page.wait_for_selector("#key", state="visible")
        page.fill("#key", "secret")
        page.press("#key", "Tab")
        page.wait_for_selector("#draw:not([disabled])")
