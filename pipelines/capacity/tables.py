"""The estimates as tables: for a terminal, and as Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from harmonica.cli.common import say

from ..report.terminal import wide_console
from .limits import Limit
from .serving import ServingEstimate
from .sizes import SizedModel
from .training import TrainingEstimate

_UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"))


@dataclass(frozen=True, slots=True)
class Section:
    """A table and the lines under it."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def print(self, *, markdown: bool) -> None:
        """Print the section on standard output."""
        if markdown:
            for line in self.markdown():
                say(line)
            return
        table = Table(title=self.title, title_style="bold", title_justify="left", show_lines=False)
        for place, heading in enumerate(self.headings):
            is_words = place == 0 or heading in _WORDS
            table.add_column(heading, justify="left" if is_words else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        console: Console = wide_console()
        console.print(table)
        for note in self.notes:
            console.print(note, markup=False)

    def markdown(self) -> list[str]:
        """Return the section as lines of Markdown, without its title."""
        table = [_line(self.headings), "|" + "---|" * len(self.headings), *map(_line, self.rows)]
        return table + [line for note in self.notes for line in ("", note)]


_WORDS = ("where", "what the program does")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def duration(seconds: float) -> str:
    """Return seconds with three digits in a unit that suits them, as in `1.25 h`."""
    size, unit = next((each for each in _UNITS if seconds >= each[0]), (1e-6, "us"))
    return f"{seconds / size:.3g} {unit}"


def amount(size: float) -> str:
    """Return bytes with three digits in a decimal unit, as in `2.5 GB`."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} B"


def gib(size: float) -> str:
    """Return bytes in GiB."""
    return f"{size / 2**30:.1f} GiB"


def model_section(model: SizedModel, num_steps: int, speedup: float, cur: float) -> Section:
    """Return the model and the plan."""
    return Section(
        f"{model.name}, {model.size}",
        ("rows an image", "branches B", "MACs of a row's step", "weights", "T", "ideal speedup", "CUR"),
        (
            (
                str(model.rows),
                str(model.num_branches),
                f"{model.macs.full / 1e9:,.1f} G",
                gib(model.weight_bytes),
                str(num_steps),
                f"{speedup:.2f}x",
                f"{cur:.1%}",
            ),
        ),
    )


def training_section(training: TrainingEstimate, gpu: str, batch_size: int) -> Section:
    """Return the phases of a training and their sum."""
    phases = tuple(
        (
            phase.name,
            str(phase.trajectories),
            f"{phase.samplings:,.1f}",
            duration(phase.compute_s),
            duration(phase.network_s),
            amount(phase.reduced_bytes),
        )
        for phase in training.phases
    )
    total = (
        "all",
        str(sum(phase.trajectories for phase in training.phases)),
        f"{sum(phase.samplings for phase in training.phases):,.1f}",
        duration(sum(phase.compute_s for phase in training.phases)),
        duration(sum(phase.network_s for phase in training.phases)),
        amount(sum(phase.reduced_bytes for phase in training.phases)),
    )
    cure = (
        "train.micro_batch_size, train.*.activation_checkpointing, train.forecast.activation_offloading, "
        "train.shard_model or more workers"
    )
    host = f", and {gib(training.memory.host)} of its host" if training.memory.host else ""
    fit = "it fits" if training.fits else f"it does not fit, see {cure}"
    price = f", cost {training.cost:,.2f}" if training.cost else ""
    return Section(
        f"Router training: batch {batch_size} on {training.workers} {gpu}",
        ("phase", "trajectories", "full samplings", "compute", "network", "reduced, a worker"),
        (*phases, total),
        (
            f"Time {duration(training.seconds)}, {training.gpu_hours:.3g} GPU hours{price}. An update takes "
            f"{duration(training.update_s)}, of which its all-reduce {duration(training.reduce_s)}.",
            f"Memory of a worker {gib(training.memory.total)}{host} (weights {gib(training.memory.weights)}, "
            f"caches {gib(training.memory.caches)}, activations {gib(training.memory.activations)}): {fit}.",
            f"Rows {amount(training.row_bytes)}, weights read at the start {amount(training.start_bytes)}.",
        ),
    )


def serving_section(
    estimates: Sequence[ServingEstimate], gpu: str, rate: float, target_s: float, quantile: float
) -> Section:
    """Return serving under the plan, beside uncached."""
    rows = tuple(
        (
            "uncached" if each.speedup == 1 else f"plan of {each.speedup:.2f}x",
            duration(each.single_s),
            str(each.batch),
            duration(each.batch_s),
            str(each.replicas_by_formula),
            str(each.replicas),
            f"{each.utilisation:.0%}",
            duration(each.latency_s),
            gib(each.memory.total) + ("" if each.fits else ", does not fit"),
            amount(each.bytes_per_s) + "/s",
            f"{each.cost_per_hour:,.2f}" if each.cost_per_hour else "",
            f"{each.cost_per_1000:,.3f}" if each.cost_per_1000 else "",
        )
        for each in estimates
    )
    return Section(
        f"Serving {rate:g} images/s on {gpu}, {quantile:.0%} within {duration(target_s)}",
        (
            *("", "one alone", "batch", "of such", "replicas, formula", "simulated", "used"),
            *(f"p{100 * quantile:g}", "memory", "answers", "cost an hour", "of 1,000"),
        ),
        rows,
    )


def limits_section(limits: Sequence[Limit], nodes: Sequence[int]) -> Section:
    """Return the limits in the order in which they bind, and what exceeds them."""
    rows = tuple(
        (
            limit.name,
            f"{limit.capacity:,.{0 if limit.capacity >= 100 else 1}f} {limit.unit}".strip(),
            limit.where,
            f"{limit.binds_at:,}" if limit.binds_at else "never",
            limit.answer,
        )
        for limit in limits
    )
    return Section(
        "What breaks first",
        ("limit", "value", "where", "binds at (nodes)", "what the program does"),
        rows,
        tuple(_exceeded(limits, count) for count in nodes),
    )


def _exceeded(limits: Sequence[Limit], nodes: int) -> str:
    """Return in a sentence which limits a number of nodes exceeds, and by how much."""
    over = [(limit.load(nodes) / limit.capacity, limit.name) for limit in limits]
    words = [f"{name} (load {_times(times)} times the limit)" for times, name in over if times > 1]
    return f"At {nodes:,} nodes: {'; '.join(words) or 'no limit is exceeded'}."


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"
