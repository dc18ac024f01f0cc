"""The page of a run: whole, self-contained, and nobody else's words taken for HTML."""

import dataclasses
import json
from html.parser import HTMLParser

import pytest
from tiny_dit import make_artifact, write_model

from harmonica.evaluation.evaluation_report import EvaluationReport
from harmonica.evaluation.plots import router_heat_map
from pipelines.config.workflow import PromptsConfig
from pipelines.presets import fashion
from pipelines.report.html_report import render
from pipelines.report.tables import comparison, results, shown
from pipelines.run_state.storage import RunStorage

SECTIONS = {
    "results",
    "gate",
    "samples",
    "comparison",
    "sweep",
    "router",
    "training",
    "endpoint",
    "not-measured",
    "settings",
    "versions",
}
HOSTILE = "<script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)>"
VERSIONS = {"ray": "2.60.0", "git revision": "abc"}
HISTORY = {
    "loss": [(1, 0.5), (2, 0.2)],
    "cur": [(1, 0.3), (2, 0.4)],
    "lambda.step_000": [(1, 1.0), (2, 0.9)],
    "lambda.step_001": [(1, 0.7), (2, 0.8)],
}
REPORT = {
    "samples": 16,
    "cur": 0.4,
    "ideal_speedup": 1.6,
    "measured_speedup": 1.5,
    "realised_share": None,
    "verdict": f"Worth having. {HOSTILE}",
    "worth_having": True,
    "arms": {
        "full": {"num_inference_steps": 20, "seconds_per_image": 0.1, "speedup": 1.0},
        "cached": {"num_inference_steps": 20, "speedup": 1.5, "psnr_to_full": 43.5, "new_metric": 0.1234},
        HOSTILE: {"psnr_to_full": 38.0, "psnr_to_full_interval": [37.5, 38.5]},
    },
}
POINTS = [
    {"method": "HarmoniCa", "seed": 0, "num_inference_steps": 20, "target_speedup": 1.4, "speedup": 1.38},
    {"method": HOSTILE, "seed": 0, "num_inference_steps": 14, "target_speedup": 1.4, "psnr_to_full": 40.0},
    {
        "method": "HarmoniCa",
        "seed": 0,
        "num_inference_steps": 20,
        "target_speedup": 1.2,
        "psnr_to_full": 48.0,
    },
]
DECISION = {
    "words": HOSTILE,
    "outcome": "refused",
    "promoted": False,
    "checks": [
        {"name": "speedup", "passed": False, "words": HOSTILE},
        {"name": "champion", "passed": None, "words": "there is no champion yet"},
        {"name": "reproduces", "passed": True, "words": "it loads"},
    ],
}


class Page(HTMLParser):
    """Tags with their attributes; strict about what is opened and closed."""

    VOID = ("meta", "link", "img", "br", "input")

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self._open = [], [], []
        self.feed(text)
        self.close()
        assert not self._open, "all that is opened is closed"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(self.words)


@pytest.fixture
def storage(tmp_path):
    return RunStorage(str(tmp_path), "r1")


def config():
    return dataclasses.replace(fashion(), run_id="r1", prompts=PromptsConfig(path=HOSTILE))


def fill(storage, tmp_path):
    """What a whole run leaves."""
    storage.write_json("report.json", REPORT)
    storage.write_json("promotion.json", DECISION)
    storage.write_json("comparison.json", {"points": POINTS, "verdict": HOSTILE})
    artifact = make_artifact(write_model(tmp_path / "model"))
    names = [f"{i}" for i in range(artifact.logits_TB.shape[1])]
    figure = tmp_path / "router.png"
    router_heat_map(artifact.logits_TB.sigmoid(), artifact.plan.to_tensor(), names, figure)
    for name in ("router.png", "samples.png", "served.png", "comparison.png"):
        storage.write_bytes(name, figure.read_bytes())


def check_self_contained(page):
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "form"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "action", "data"):
                assert value.startswith("data:"), (tag, value)


@pytest.mark.parametrize("is_whole", [True, False])
def test_every_section_is_there_and_nothing_is_fetched(storage, tmp_path, is_whole):
    if is_whole:
        fill(storage, tmp_path)
    text = render(config(), storage, HISTORY if is_whole else {}, VERSIONS)
    page = Page(text)
    assert {of["id"] for tag, of in page.tags if tag == "section"} == SECTIONS
    check_self_contained(page)
    assert "url(" not in text and "@import" not in text
    assert sum(tag == "img" for tag, _ in page.tags) == (6 if is_whole else 0)
    viewport = {of.get("name"): of.get("content") for tag, of in page.tags if tag == "meta"}
    assert "width=device-width" in viewport["viewport"] and "color-scheme: light dark" in text
    assert len(text) < 1_000_000


def test_other_peoples_words_are_words(storage, tmp_path):
    fill(storage, tmp_path)
    ours = config()
    object.__setattr__(ours, "run_id", HOSTILE)  # which the settings themselves refuse
    text = render(ours, storage, HISTORY, VERSIONS | {"git revision": HOSTILE})
    page = Page(text)
    check_self_contained(page)
    assert "<script" not in text and "<img src=http" not in text
    # Title, heading, verdict, variant, decision, check, method, comparison, version, two settings.
    assert page.text.count("alert('x')") == 11


def test_it_says_what_was_not_measured_and_shows_no_secrets(storage, tmp_path):
    page = Page(render(config(), storage, {}, VERSIONS))
    for words in ("Nothing was evaluated", "Public models", "No decision was made", "No curves"):
        assert words in page.text
    fill(storage, tmp_path)
    page = Page(render(config(), storage, HISTORY, VERSIONS))
    for words in ("Speed on a GPU", "LPIPS to full: no weights", "stage sweep", "43.50 dB", "ray 2.60.0"):
        assert words in page.text
    assert "Nothing was evaluated" not in page.text and "No curves" not in page.text
    secret = dataclasses.replace(config(), model=dataclasses.replace(config().model, path="s3://id:hush@b/m"))
    assert "hush" not in render(secret, storage, {}, VERSIONS)


def test_tables_show_numbers_nobody_knew_of_and_their_intervals():
    columns, rows = results(EvaluationReport.from_json(REPORT))
    assert columns == ["full", "cached", HOSTILE.replace("_", " ")]
    found = dict(rows)
    assert found["new metric"] == ["", "0.1234", ""]
    assert found["PSNR to full"][2] == "38.00 dB (37.50 dB to 38.50 dB)"
    assert shown("worth", {}) == ""
    titles = [(title, len(rows)) for title, _, rows in comparison(POINTS)]
    assert titles == [("target 1.20x", 1), ("target 1.40x", 2)]
    json.dumps(comparison(POINTS))
