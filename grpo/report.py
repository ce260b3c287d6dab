"""What a person looks at: grids of pictures with their prompts, plans and rewards, and one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .config import Config
from .evaluate import Sample

if TYPE_CHECKING:  # who trains without pictures need not have it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GRID_COLUMNS = 8
_PICTURE_INCHES = 2.1
_PHASES = ("plan", "draw", "decode", "reward", "reference", "train")


def pick(samples: Sequence[Sample], count: int = GRID_COLUMNS) -> list[Sample]:
    """`count` samples, taken evenly from every task type, the same ones for the same list."""
    tasks: dict[str, list[Sample]] = {}
    for sample in samples:
        tasks.setdefault(sample.task_type, []).append(sample)
    picked: list[Sample] = []
    for turn in range(count):
        for task in sorted(tasks):
            stride = max(1, len(tasks[task]) * len(tasks) // count)
            if turn * stride < len(tasks[task]) and len(picked) < count:
                picked.append(tasks[task][turn * stride])
    return picked


def grid_figure(rows: Mapping[str, Sequence[Sample]]) -> Figure:
    """A row of pictures for each entry, with prompt, reward and plan under each picture."""
    from matplotlib.figure import Figure

    columns = max(len(samples) for samples in rows.values())
    captions = {title: [_caption(sample) for sample in samples] for title, samples in rows.items()}
    lines = [max(len("\n".join(caption).splitlines()) for caption in captions[title]) for title in rows]
    heights = [height for count in lines for height in (_PICTURE_INCHES, 0.14 * count + 0.2)]
    figure = Figure(figsize=((_PICTURE_INCHES + 0.2) * columns, sum(heights) + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots(2 * len(rows), columns, squeeze=False, height_ratios=heights)
    for axis in axes.flat:
        axis.axis("off")
    for row, (title, samples) in enumerate(rows.items()):
        axes[2 * row][0].set_title(title, loc="left", fontsize=11, parse_math=False)
        for column, sample in enumerate(samples):
            small = sample.image.shape[0] < 128
            axes[2 * row][column].imshow(sample.image, interpolation="nearest" if small else None)
            head, plan = captions[title][column]
            place = {"transform": axes[2 * row + 1][column].transAxes, "va": "top", "x": 0, "y": 1, "in_layout": False}
            place["parse_math"] = False  # a dollar sign is a dollar sign
            axes[2 * row + 1][column].text(s=head, fontsize=8, weight="bold", **place)
            axes[2 * row + 1][column].text(s="\n" * len(head.splitlines()) + plan, fontsize=8, **place)
    return figure


def _caption(sample: Sample) -> tuple[str, str]:
    """(prompt and reward, plan), wrapped to the width of a picture."""
    head = textwrap.fill(sample.prompt, 31)
    if not math.isnan(sample.reward):
        head += f"\nreward {sample.reward:.2f}"
    return head, textwrap.fill(textwrap.shorten(sample.plan, 240, placeholder=" …"), 34)


def draw_grid(rows: Mapping[str, Sequence[Sample]], path: Path) -> None:
    """Write `grid_figure` as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grid_figure(rows).savefig(path, dpi=100)


def write_report(
    output: Path, config: Config, summary: Mapping[str, Any], heldout: Mapping[str, Sequence[Sample]]
) -> None:
    """Write before_after.png and report.html from metrics.jsonl and the held-out samples in `output`."""
    lines = (output / "metrics.jsonl").read_text().splitlines() if (output / "metrics.jsonl").exists() else []
    metrics = [json.loads(line) for line in lines]
    sections = [_table(summary)]
    if metrics:
        sections += [
            _section("Reward", _curves(metrics, ("reward", *_keys(metrics, "reward_by_task/")))),
            _section("Rewards and monitors", _curves(metrics, _keys(metrics, "rewards/", "/mean"))),
            _section("Milliseconds of a step that a reward took", _reward_times(metrics)),
            _section("KL to the initial model", _curves(metrics, ("kl", "text/kl", "image/kl"))),
            _section("Entropy (nats a token)", _curves(metrics, ("entropy", "text/entropy", "image/entropy"))),
            _section("Seconds of a step, by phase", _phase_bars(metrics)),
        ]
    if heldout:
        figure = grid_figure({tag: pick(samples) for tag, samples in heldout.items()})
        figure.savefig(output / "before_after.png", dpi=100)
        sections.append(_section(f"Held-out prompts, {' and '.join(heldout)} training", _image(figure, "png")))
    for grid in sorted((output / "samples").glob("step-*.png"))[-3:]:
        sections.append(_section(f"Training samples, {grid.stem}", _tag(grid.read_bytes(), "image/png")))
    settings = html.escape(yaml.safe_dump(asdict(config), sort_keys=False))
    sections.append(f"<details><summary>Settings</summary><pre>{settings}</pre></details>")
    style = (
        "body{font:15px system-ui;max-width:1200px;margin:2em auto;padding:0 1em}img{max-width:100%}td{padding:2px 1em}"
    )
    body = "\n".join(sections)
    (output / "report.html").write_text(
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(output.name)}</title>"
        f"<style>{style}</style><h1>{html.escape(output.name)}</h1>\n{body}</html>\n",
        encoding="utf-8",
    )


def _keys(metrics: Sequence[Mapping[str, float]], prefix: str, suffix: str = "") -> tuple[str, ...]:
    return tuple(sorted({key for row in metrics for key in row if key.startswith(prefix) and key.endswith(suffix)}))


def _section(title: str, content: str) -> str:
    return f"<h2>{html.escape(title)}</h2>\n{content}" if content else ""


def _table(summary: Mapping[str, Any]) -> str:
    def show(value: Any) -> str:
        return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    rows = "".join(f"<tr><td>{html.escape(key)}</td><td>{show(value)}</td></tr>" for key, value in summary.items())
    return f"<table>{rows}</table>"


def _tag(data: bytes, mime: str) -> str:
    return f"<img alt='' src='data:{mime};base64,{base64.b64encode(data).decode()}'>"


def _image(figure: Figure, kind: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=100)
    return _tag(buffer.getvalue(), "image/svg+xml" if kind == "svg" else f"image/{kind}")


def _plot() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    axis = figure.subplots()
    axis.grid(alpha=0.3)
    axis.set_xlabel("step")
    return figure, axis


def _curves(metrics: Sequence[Mapping[str, float]], keys: Sequence[str]) -> str:
    """Lines over the steps, each thin as measured and thick as a running mean."""
    figure, axis = _plot()
    for key in keys:
        points = [(row["step"], row[key]) for row in metrics if key in row]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        window = max(1, len(values) // 15)
        smooth = [sum(v := values[max(0, i - window + 1) : i + 1]) / len(v) for i in range(len(values))]
        (line,) = axis.plot(
            steps, smooth, lw=2.5 if key == keys[0] else 1.5, label=re.sub("^reward(s|_by_task)/|/mean$", "", key)
        )
        axis.plot(steps, values, lw=0.7, alpha=0.25, color=line.get_color())
    if not axis.lines:
        return ""
    for text in axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1)).get_texts():
        text.set_parse_math(False)
    return _image(figure, "svg")


def _reward_times(metrics: Sequence[Mapping[str, float]]) -> str:
    """Mean over the steps for each reward, and the share that the rollout hid."""
    times = {}
    for key in _keys(metrics, "rewards/", "/milliseconds"):
        ms, hidden = (sum(row.get(k, 0.0) for row in metrics) / len(metrics) for k in (key, f"{key}_hidden"))
        name = key.removeprefix("rewards/").removesuffix("/milliseconds")
        times[name] = f"{ms:.1f} ms, {hidden / ms if ms else 0:.0%} hidden"
    return _table(times) if times else ""


def _phase_bars(metrics: Sequence[Mapping[str, float]]) -> str:
    figure, axis = _plot()
    groups = [metrics[i : i + max(1, len(metrics) // 50)] for i in range(0, len(metrics), max(1, len(metrics) // 50))]
    steps = [group[0]["step"] for group in groups]
    base = [0.0] * len(groups)
    for phase in _PHASES:
        height = [sum(row.get(f"seconds/{phase}", 0.0) for row in group) / len(group) for group in groups]
        axis.bar(steps, height, bottom=base, label=phase, width=0.9 * max(1, len(metrics) // 50))
        base = [b + h for b, h in zip(base, height, strict=True)]
    axis.set_ylabel("s")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return _image(figure, "svg")
