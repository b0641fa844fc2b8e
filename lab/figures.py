"""What a benchmark has measured: samples with their median and spread, each beside what it is compared with."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lab.console import Console, Table

_COLUMNS = (
    ("", -49), ("n", 4), ("median", 7), ("min", 7), ("p25", 7), ("p75", 7), ("p95", 7), ("max", 7), ("unit", -4),
    ("beside", 7), ("ratio", 6),
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    key: str
    """Stays the same from run to run: for whoever compares."""
    group: str
    what: str
    unit: str
    samples: Sequence[float]
    beside: "Figure | None"
    """What it is compared with, measured in the same run."""

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def percentile(self, percent: int) -> float:
        if len(self.samples) == 1:
            return self.samples[0]
        return statistics.quantiles(self.samples, n=100, method="inclusive")[percent - 1]

    @property
    def ratio(self) -> float | None:
        return self.median / self.beside.median if self.beside and self.beside.median else None

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"key": self.key, "group": self.group, "what": self.what, "unit": self.unit}
        found |= {"n": len(self.samples), "median": self.median, "min": min(self.samples), "max": max(self.samples)}
        found |= {f"p{percent}": self.percentile(percent) for percent in (25, 75, 95)}
        found |= {"beside": self.beside.key if self.beside else None, "ratio": self.ratio}
        return found | {"samples": [round(sample, 4) for sample in self.samples]}


class Figures:
    """In the order in which they came."""

    def __init__(self) -> None:
        self._figures: dict[str, Figure] = {}

    def add(
        self, key: str, group: str, what: str, samples: Sequence[float], *, unit: str = "ms", beside: str | None = None
    ) -> None:
        """`beside`: the key of what it is compared with."""
        if samples:
            self._figures[key] = Figure(
                key, group, what, unit, tuple(samples), self._figures[beside] if beside else None
            )

    def __getitem__(self, key: str) -> Figure:
        return self._figures[key]

    def __contains__(self, key: object) -> bool:
        return key in self._figures

    def __iter__(self) -> Iterator[Figure]:
        return iter(self._figures.values())

    def show(self, console: Console, groups: Sequence[str]) -> None:
        """A table by groups. The column `beside` is the median of what a figure is compared with."""
        table = Table(console, _COLUMNS)
        for group in groups:
            console.text()
            console.headline(group)
            for figure in self:
                if figure.group == group:
                    table.row(f"  {figure.what}", *_cells(figure))

    def as_json(self) -> list[dict[str, Any]]:
        return [figure.as_json() for figure in self]


def _cells(figure: Figure) -> list[str]:
    values = [figure.median]
    if len(figure.samples) > 1:
        quartiles = [figure.percentile(percent) for percent in (25, 75, 95)]
        values += [min(figure.samples), *quartiles, max(figure.samples)]
    numbers = [_number(value) for value in values] + [""] * (6 - len(values))
    beside = _number(figure.beside.median) if figure.beside else ""
    ratio = f"{figure.ratio:.3g}x" if figure.ratio is not None else ""
    return [str(len(figure.samples)), *numbers, figure.unit, beside, ratio]


def _number(value: float) -> str:
    """Three digits: more is noise."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
