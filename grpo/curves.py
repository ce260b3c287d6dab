"""Draws curves and bars as SVG for an HTML page, in its light or dark colours. The legend shows the last values."""

from __future__ import annotations

import html
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

Row = Mapping[str, float]
Point = tuple[float, float]

STYLE = """
svg{display:block;width:100%;font-size:12px} text{fill:currentColor}
path{fill:none;stroke:currentColor;stroke-linecap:round;stroke-linejoin:round} .grid{opacity:.2} .raw{opacity:.45}
.bar{fill:currentColor;stroke:none} .legend{font-size:.85em} .legend span{white-space:nowrap;margin-right:1em}
.c0{color:#3987d2} .c1{color:#e8801a} .c2{color:#35a146} .c3{color:#e05252} .c4{color:#9a76c8} .c5{color:#a97563}
.c6{color:#dc78bd} .c7{color:#8a8a8a} .c8{color:#a3a420} .c9{color:#1fabbd}
"""
_COLOURS = 10
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 400, 240, 46, 8, 10, 32  # wider, the text is tiny on a phone
_MOST = 150  # maximum number of bars, of points of a mean, and of pairs (lowest, highest) of measured values


def curves(rows: Sequence[Row], keys: Sequence[str]) -> str:
    """A chart over the steps: for each key a thin line of its values and a thick line of their running mean."""
    series = {key: [(row["step"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))] for key in keys}
    series = {key: points for key, points in series.items() if points}
    if not series:
        return ""
    every = [point for points in series.values() for point in points]
    axes = _Axes([x for x, _ in every], [y for _, y in every])
    drawn = []
    for i, points in enumerate(series.values()):
        drawn.append(f"<path class='raw c{i % _COLOURS}' stroke-width='.8' d='{axes.path(_thin(points))}'/>")
        width = 1.6 if i else 2.6
        drawn.append(f"<path class='c{i % _COLOURS}' stroke-width='{width}' d='{axes.path(_smooth(points))}'/>")
    return axes.figure(drawn, [(_label(key), points[-1][1]) for key, points in series.items()])


def bars(rows: Sequence[Row], keys: Sequence[str]) -> str:
    """Stacked bars of the values of `keys`, one for each step. With many steps, a bar is a mean over several."""
    size = -(-len(rows) // _MOST)
    groups = [rows[i : i + size] for i in range(0, len(rows), size)] if rows else []
    heights = {key: [sum(row.get(key, 0.0) for row in group) / len(group) for group in groups] for key in keys}
    heights = {key: values for key, values in heights.items() if any(values)}
    if not heights:
        return ""
    starts = [group[0]["step"] for group in groups]
    axes = _Axes([starts[0], starts[-1] + size], [0.0, *map(sum, zip(*heights.values(), strict=True))])
    base, drawn = [0.0] * len(groups), []
    for i, values in enumerate(heights.values()):
        top = [b + v for b, v in zip(base, values, strict=True)]
        corners = zip(map(axes.x, starts), map(axes.y, base), map(axes.y, top), strict=True)
        wide = 0.9 * (axes.x(starts[0] + size) - axes.x(starts[0]))
        path = "".join(f"M{x:.1f} {low:.1f}V{high:.1f}h{wide:.2f}V{low:.1f}z" for x, low, high in corners)
        drawn.append(f"<path class='bar c{i % _COLOURS}' d='{path}'/>")
        base = top
    return axes.figure(drawn, [(_label(key), rows[-1].get(key, 0.0)) for key in heights])


class _Axes:
    """Converts values to coordinates of the picture, whose frame contains all of `xs` and `ys`."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        self.xs, self.ys = _range(xs), _range(ys)

    def x(self, value: float) -> float:
        low, high = self.xs
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.ys
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    def path(self, points: Sequence[Point]) -> str:
        places = [f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points]
        return f"M{'L'.join(places)}h0"  # h0 makes a dot of a single point

    def figure(self, drawn: Sequence[str], last: Sequence[tuple[str, float]]) -> str:
        """The whole SVG with its grid and legend, and with a text for screen readers."""
        right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        parts = []
        for tick in _ticks(*self.ys):
            y = self.y(tick)
            parts.append(f"<path class='grid' d='M{_LEFT} {y:.1f}H{right}'/>")
            parts.append(f"<text text-anchor='end' x='{_LEFT - 5}' y='{y + 4:.1f}'>{tick:.6g}</text>")
        for tick in _ticks(*self.xs, least=1):
            parts.append(f"<path class='grid' d='M{self.x(tick):.1f} {_TOP}V{bottom}'/>")
            parts.append(f"<text text-anchor='middle' x='{self.x(tick):.1f}' y='{bottom + 15}'>{tick:.6g}</text>")
        parts.append(f"<text text-anchor='end' x='{right}' y='{_HEIGHT - 3}'>step</text>")
        values = [f"{html.escape(label, quote=True)} {value:.4g}" for label, value in last]
        legend = "".join(f"<span><b class='c{i % _COLOURS}'>■</b> {text}</span> " for i, text in enumerate(values))
        return (
            f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='last step: {', '.join(values)}'>"
            f"{''.join([*parts, *drawn])}</svg><p class='legend'>{legend}</p>"
        )


def _label(key: str) -> str:
    name = re.sub("^(heldout/)?(reward(s|_by_task)/)?|^seconds/|/mean$", "", key)
    return textwrap.shorten(name, 30, placeholder=" …")


def _range(values: Sequence[float]) -> Point:
    low, high = min(values), max(values)
    pad = (high - low) * 0.03 or abs(low) * 0.1 or 1.0
    return (low if low == 0 < high else low - pad), high + pad


def _ticks(low: float, high: float, least: float = 0.0) -> Iterator[float]:
    """At most six round numbers in the range, with a distance of at least `least`."""
    power = 10 ** math.floor(math.log10((high - low) / 5))
    step = max(least, next(step for m in (1, 2, 5, 10) if (high - low) / (step := m * power) <= 5))
    yield from (step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1))


def _smooth(points: Sequence[Point]) -> list[Point]:
    """A running mean over a fifteenth of the points, at no more than about _MOST of them."""
    window = max(1, len(points) // 15)
    sums = [0.0, *accumulate(y for _, y in points)]
    means = [(sums[i + 1] - sums[max(0, i + 1 - window)]) / min(window, i + 1) for i in range(len(points))]
    stride = -(-len(points) // _MOST)
    return [(points[i][0], means[i]) for i in sorted({*range(0, len(points), stride), len(points) - 1})]


def _thin(points: Sequence[Point]) -> list[Point]:
    """The points. If there are many, the lowest and the highest of each group, so that no peak is lost."""
    size = -(-len(points) // _MOST)
    if size <= 2:
        return list(points)
    stretches = [points[i : i + size] for i in range(0, len(points), size)]
    ends = [{min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])} for part in stretches]
    return [point for pair in ends for point in sorted(pair)]
