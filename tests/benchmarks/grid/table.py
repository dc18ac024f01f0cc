"""The tables of the grid, from its results."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pipelines.compare.published import FORECASTS
from tests.benchmarks.grid.points import EVEN, LEARNED, UNTRAINED

RESULTS = Path(__file__).parent
LOG = RESULTS.parent / "RESULTS.md"
PRESETS = ("fashion", "emoji", "fashion-text")
Line = dict[str, Any]
_NEAR = 0.97
"""Fraction of a speed at which a rival counts as meeting it."""
_LEAST_GAIN = 1.0
"""What learned steps are wanted to be above even ones after the same fit, in dB."""


@dataclass(frozen=True)
class Measure:
    """A metric of the lines."""

    key: str
    name: str
    form: str
    sign: int = 1
    """-1 where less is better."""


PSNR, WORST = Measure("psnr", "PSNR", ".1f"), Measure("worst", "worst tenth", ".1f")
MEASURES = (
    PSNR,
    WORST,
    Measure("ssim", "SSIM", ".4f"),
    Measure("features", "features", ".2g", -1),
    Measure("frechet", "Frechet", ".2g", -1),
)


@dataclass(frozen=True)
class Standing:
    """How ours stands beside the best of the others in one metric."""

    measure: Measure
    lead: float
    """Mean over seeds above the rival's, so that more is better."""
    spread: float
    """Highest less lowest, over seeds."""
    seeds: int
    rival: str
    value: float
    """The rival's."""

    def __str__(self) -> str:
        if self.lead <= 0:
            return f"no: {self.rival} {self.value:{self.measure.form}}"
        if self.seeds < 2:
            return "first, one seed"
        return "**yes**" if self.lead > self.spread else "first, within the spread"


def read_lines(path: Path) -> list[Line]:
    """The results so far; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class PointResults:
    """The arms of one number of steps and one speed."""

    def __init__(self, num_steps: int, speedup: float, lines: Iterable[Line]) -> None:
        self.num_steps, self.speedup = num_steps, speedup
        last: dict[tuple[str, int | None], Line] = {}  # later lines are of a newer fit
        for line in lines:
            if (line["steps"], line["speedup"]) == (num_steps, speedup):
                last[line["method"], line["seed"]] = line
        self.of: dict[str, list[Line]] = {}
        newest = {method: line.get("fit") for (method, _), line in last.items()}
        for (method, _), line in last.items():
            if line.get("fit") == newest[method]:  # seeds of another fit are no spread of this one
                self.of.setdefault(method, []).append(line)
        fast = _NEAR * speedup
        self.rivals = [
            name
            for name, lines in self.of.items()
            if name not in (LEARNED, EVEN, UNTRAINED) and all(line["speed"] >= fast for line in lines)
        ]
        if not self.of.keys() >= FORECASTS.keys():  # who is first is said once all are measured
            self.rivals = []

    def mean(self, method: str, measure: Measure) -> float:
        """A method's mean over seeds."""
        return fmean([line[measure.key] for line in self.of[method]])

    def standing(self, measure: Measure) -> Standing:
        """Where ours stands, of all methods that are about as fast."""
        ours = [line[measure.key] for line in self.of[LEARNED]]
        rival = max(self.rivals, key=lambda name: measure.sign * self.mean(name, measure))
        value, spread = self.mean(rival, measure), max(ours) - min(ours)
        return Standing(measure, measure.sign * (fmean(ours) - value), spread, len(ours), rival, value)

    def gain(self) -> float | None:
        """What ours is above even steps after the same fit, in dB: the mean over the seeds that have both."""
        both = [
            ours["psnr"] - even["psnr"]
            for ours in self.of[LEARNED]
            for even in self.of.get(EVEN, [])
            if ours["seed"] == even["seed"]
        ]
        return fmean(both) if both else None

    def disappointments(self) -> list[str]:
        """What is less than is wanted, in words."""
        found, gain = [], self.gain()
        if gain is not None and gain < _LEAST_GAIN:
            found.append(f"{gain:+.1f} dB over even steps")
        if self.rivals and self.standing(PSNR).lead <= 0:
            found.append("not first")
        if self.rivals and self.standing(WORST).lead <= 0:
            found.append(f"worst tenth behind {self.standing(WORST).rival}")
        if EVEN in self.of and self.mean(EVEN, WORST) > self.mean(LEARNED, WORST):
            found.append("worst tenth behind even steps")
        return found

    def shown(self, method: str, measure: Measure) -> str:
        """A method's mean (lowest to highest over seeds)."""
        values = [line[measure.key] for line in self.of.get(method, [])]
        if len(values) < 2:
            return f"{values[0]:{measure.form}}" if values else ""
        low, high = (f"{value:{measure.form}}" for value in (min(values), max(values)))
        return f"{fmean(values):{measure.form}} ({low} to {high})"

    def row(self) -> list[str]:
        """The cells of the point."""
        rival, first = "", [""] * len(MEASURES)
        if self.rivals:
            standings = [self.standing(measure) for measure in MEASURES]
            rival, first = f"{standings[0].rival} {standings[0].value:.1f}", list(map(str, standings))
        ours = f"**{self.shown(LEARNED, PSNR)}**, worst {self.shown(LEARNED, WORST)}"
        even, untrained = (
            f"{self.shown(name, PSNR)}, worst {self.shown(name, WORST)}" if name in self.of else ""
            for name in (EVEN, UNTRAINED)
        )
        place = f"T = {self.num_steps}, {self.speedup:.1f}x"
        return [place, ours, even, untrained, rival, *first, "; ".join(self.disappointments())]


def table(lines: Sequence[Line]) -> str:
    """The table of one model's results, in Markdown; points without a learned plan are left out."""
    head = ["", "learned, fitted", "even steps, fitted", "even steps, untrained", "best rival in PSNR"]
    head += [f"first in {measure.name}" for measure in MEASURES] + ["disappoints"]
    places = sorted({(line["steps"], line["speedup"]) for line in lines})
    points = [PointResults(*place, lines) for place in places]
    rows = [head, ["---"] * len(head), *(point.row() for point in points if LEARNED in point.of)]
    return "\n".join("|" + "".join(f" {cell} |" if cell else " |" for cell in row) for row in rows)


def tables(folder: Path = RESULTS) -> dict[str, str]:
    """The tables of all models that have results, by the preset's name."""
    results = {preset: read_lines(folder / f"{preset}.jsonl") for preset in PRESETS}
    return {preset: table(lines) for preset, lines in results.items() if lines}


def with_tables(log: str) -> str:
    """The text of the log with the present tables between its markers."""
    for preset, found in tables().items():
        start, end = (f"<!-- --8<-- [{what}:grid-{preset}] -->" for what in ("start", "end"))
        before, marker, after = log.partition(start)
        if not marker:
            raise ValueError(f"{LOG.name} has no {start}")
        log = f"{before}{start}\n\n{found}\n\n{end}{after.partition(end)[2]}"
    return log
