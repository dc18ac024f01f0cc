"""The evaluation's report keeps its JSON, key for key, and metrics know which way is better."""

import json
from pathlib import Path

import pytest

from harmonica.builtin import CHAMPION, EMOJI_CHAMPION
from harmonica.evaluation.evaluation_report import (
    CACHED,
    FULL,
    Estimate,
    EvaluationReport,
    RouterSpeeds,
    VariantResult,
)
from harmonica.evaluation.metric_table import (
    CUR,
    FRECHET_TO_FULL,
    METRICS,
    PSNR_TO_FULL,
    metric_of,
)

ROOT = Path(__file__).parents[2]
MEMBER = {
    "num_inference_steps": 8,
    "speedup": 1.2,
    "psnr_to_full": 41.0,
    "psnr_to_full_interval": [40.5, 41.5],
    "method": "learned steps",
    "cur": 0.3,
    "ideal_speedup": 1.3,
    "measured_speedup": 1.2,
    "realised_share": 0.7,
}
WHOLE = {
    "run_id": "r1",
    "samples": 16,
    "reuse": "hold",
    "method": "SDT",
    "cur": 0.0,
    "ideal_speedup": 1.0,
    "measured_speedup": 1.0,
    "realised_share": None,
    "arms": {
        "full": {"num_inference_steps": 8, "seconds_per_image": 0.1, "seconds_spread": 0.0, "speedup": 1.0},
        "cached": {"num_inference_steps": 8, "psnr_to_full": 40, "a_new_metric": 0.0},
        "cached 1.3x": MEMBER,
    },
    "noise_floor": {"frechet_to_full": 0.5, "frechet_to_full_interval": [0.25, 0.75]},
    "transfer": {"9 steps full": {"label_accuracy": 1.0}, "9 steps cached": {"psnr_to_full": 30.0}},
    "worth_having": False,
    "verdict": "Not worth having.",
    "of_another_version": {"kept": [1, 2]},
}


def committed_reports() -> list[Path]:
    """The evaluation's reports in the repository: JSON objects that have variants and a speed."""
    found = []
    for path in (CHAMPION / "report.json", *ROOT.glob("harmonica/builtin/*/report.json")):
        content = json.loads(path.read_text())
        if "arms" in content and "measured_speedup" in content:
            found.append(path)
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("path", committed_reports(), ids=lambda path: path.parent.name)
def test_a_committed_report_is_written_as_it_was_read(path: Path) -> None:
    stored = json.loads(path.read_text())
    report = EvaluationReport.from_json(stored)
    assert report.to_json() == stored and not report.extra
    assert report.cached.psnr_to_full == stored["arms"]["cached"]["psnr_to_full"]
    assert [*report.cached.to_json()] == [*stored["arms"]["cached"]], "in the order in which it is shown"


@pytest.mark.parametrize("champion", [CHAMPION, EMOJI_CHAMPION])
def test_a_champion_s_report_is_among_them(champion: Path) -> None:
    assert champion / "report.json" in committed_reports()


def test_every_part_of_a_report_comes_back_key_for_key() -> None:
    report = EvaluationReport.from_json(WHOLE)
    assert json.loads(json.dumps(report.to_json())) == WHOLE
    assert EvaluationReport.from_json(report.to_json()) == report
    assert report.cached.numbers["a_new_metric"] == Estimate(0.0)
    assert report.extra == {"of_another_version": {"kept": [1, 2]}}


def test_what_was_not_measured_has_no_key_but_the_realised_share() -> None:
    report = EvaluationReport({FULL: VariantResult()}, RouterSpeeds.of("", 0.0, 1.0, 1.0), 4)
    assert report.to_json() == {
        "samples": 4,
        "cur": 0.0,
        "ideal_speedup": 1.0,
        "measured_speedup": 1.0,
        "realised_share": None,
        "arms": {"full": {}},
    }


def test_a_member_s_report_is_its_own() -> None:
    alone = EvaluationReport.from_json(WHOLE).of_member("1.3x")
    measured, about = dict([*MEMBER.items()][:4]), dict([*MEMBER.items()][4:])
    assert alone.to_json() == {"samples": 16, **about, "arms": {CACHED: measured}}
    assert alone.cached.metrics[PSNR_TO_FULL] == Estimate(41.0, (40.5, 41.5))
    with pytest.raises(ValueError, match="no member '9x'"):
        EvaluationReport.from_json(WHOLE).of_member("9x")


@pytest.mark.parametrize("key", ["samples", "cur", "ideal_speedup", "measured_speedup", "arms"])
def test_a_report_without_what_all_of_them_have_is_refused_by_name(key: str) -> None:
    with pytest.raises(ValueError, match=f"has no '{key}': evaluate"):
        EvaluationReport.from_json({name: value for name, value in WHOLE.items() if name != key})


def test_metrics_know_which_way_is_better() -> None:
    nan = float("nan")
    psnr, frechet = METRICS[PSNR_TO_FULL], METRICS[FRECHET_TO_FULL]
    assert psnr.is_better(2, 1) and not psnr.is_better(1, 1) and not psnr.is_better(nan, 1)
    assert frechet.is_better(1, 2) and not frechet.is_better(1, 1) and not frechet.is_better(nan, 1)
    with pytest.raises(ValueError, match="cur has no better direction"):
        METRICS[CUR].is_better(1, 2)
    assert psnr.shown(40) == "40.00 dB" and psnr.heading == "PSNR to full, dB"
    assert metric_of("a_new_metric").name == "a new metric"
