"""Distributions as SVG: every sample a dot, a box from the first to the third quartile, a line at the median."""

import math
from collections.abc import Iterator, Sequence
from html import escape

from lab.figures import Figure

_LABELS, _WIDTH, _TOP, _ROW = 290, 640, 36, 28


def svg(figures: Sequence[Figure]) -> str:
    """One row for each figure, on one logarithmic axis. All have the same unit."""
    axis = _Axis([sample for figure in figures for sample in figure.samples])
    height = _TOP + _ROW * len(figures) + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LABELS + _WIDTH + 40}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for value, is_power in axis.ticks():
        at = axis.at(value)
        parts.append(f'<path d="M{at:.1f} {_TOP - 6}V{height - 10}" stroke="{"#bbb" if is_power else "#eee"}"/>')
        if is_power:
            parts.append(f'<text x="{at:.1f}" y="{_TOP - 12}" text-anchor="middle">{value:g} {figures[0].unit}</text>')
    for row, figure in enumerate(figures):
        y = _TOP + _ROW * (row + 0.5)
        left, median, right = (axis.at(figure.percentile(percent)) for percent in (25, 50, 75))
        parts.append(f'<text x="{_LABELS - 12}" y="{y + 4:.1f}" text-anchor="end">{escape(figure.what)}</text>')
        parts.append(f'<rect x="{left:.1f}" y="{y - 9:.1f}" width="{right - left:.1f}" height="18" fill="#9cf"/>')
        parts += [
            f'<circle cx="{axis.at(sample):.1f}" cy="{y:.1f}" r="2" fill="#036" fill-opacity="0.4"/>'
            for sample in figure.samples
        ]
        parts.append(f'<path d="M{median:.1f} {y - 9:.1f}v18" stroke="#c00" stroke-width="2"/>')
    return "\n".join([*parts, "</svg>", ""])


class _Axis:
    """Logarithmic, from the power of ten below the least value to the one above the greatest."""

    def __init__(self, values: Sequence[float]) -> None:
        known = [value for value in values if value > 0] or [1.0]
        self._low = math.floor(math.log10(min(known)))
        self._high = max(self._low + 1, math.ceil(math.log10(max(known))))

    def at(self, value: float) -> float:
        decades = math.log10(max(value, 10.0**self._low)) - self._low
        return _LABELS + _WIDTH * decades / (self._high - self._low)

    def ticks(self) -> Iterator[tuple[float, bool]]:
        """Values, and whether each is a power of ten."""
        for power in range(self._low, self._high):
            yield from ((step * 10.0**power, step == 1) for step in range(1, 10))
        yield 10.0**self._high, True
