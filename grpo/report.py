"""Draws grids of pictures with prompts, plans and rewards, and report.html, a page that needs no other file."""

from __future__ import annotations

import base64
import functools
import html
import io
import json
import logging
import math
import re
import textwrap
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from tqdm import tqdm

from .curves import STYLE as CHART_STYLE
from .curves import bars, curves
from .files import METRICS, whole
from .samples import Sample, heldout_metrics, load_samples, reward_rows

if TYPE_CHECKING:  # matplotlib is optional
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .config import Config

GRID_COLUMNS = 8
_PITCH, _PICTURE = 2.3, 2.1  # inches: distance between pictures, and width of a picture
_TITLE_LINE, _LINE = 0.2, 0.14
_MOST_PIXELS = 30_000  # matplotlib draws at most 65,536
_SMALL = 128  # a picture with fewer pixels is shown without smoothing
_FONT = "DejaVu Sans"  # ships with matplotlib
_NO_TEXT = ("Last Resort", "cm")  # fonts that show boxes or other symbols in place of characters
_PHASES = tuple(f"seconds/{name}" for name in ("plan", "draw", "decode", "reward", "wait", "reference", "train"))
_RECENT = 40  # steps
_STYLE = """
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:1200px;margin:auto;padding:1em;overflow-wrap:anywhere}
img{max-width:100%;height:auto} table{border-collapse:collapse;margin:1em 0} caption,th{text-align:left}
h2{font-size:1.25em}
td,th{padding:.1em 1.5em .1em 0} td+td,th+th{text-align:right;white-space:nowrap}
.plots,.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,22em),1fr));gap:1.5em}
.pictures{grid-template-columns:repeat(auto-fill,minmax(min(100%,17em),1fr))}
figure{margin:0} p{margin:.3em 0} pre{white-space:pre-wrap}
.tags{display:grid;grid-template-columns:repeat(auto-fit,minmax(0,1fr));gap:.7em}
.tags p:last-child{max-height:12em;overflow:auto} .tags img{width:100%} .pixels{image-rendering:pixelated}
.alarm{border-left:.3em solid #e05252;padding-left:.7em} nav{margin:1.5em 0} nav a,nav b{padding:.2em .4em}
#note:not(:empty){position:fixed;bottom:0;padding:.5em;background:Canvas;border:1px solid}
"""
STYLE = CHART_STYLE + _STYLE


@contextmanager
def no_failure(what: str) -> Iterator[None]:
    """Print an error in one line instead of raising it: a picture that cannot be drawn must not end a run."""
    try:
        yield
    except Exception as error:
        tqdm.write(f"{what}: {type(error).__name__}: {' '.join(str(error).split())}")


def pick(samples: Sequence[Sample], count: int = GRID_COLUMNS) -> list[Sample]:
    """Pick `count` samples, evenly from all task types. The same list gives the same samples."""
    return [samples[i] for i in pick_places([sample.task_type for sample in samples], count)]


def pick_places(task_types: Sequence[str], count: int = GRID_COLUMNS) -> list[int]:
    """The indices of the samples that `pick` picks, from the task types of all samples."""
    tasks: dict[str, list[int]] = {}
    for place, task in enumerate(task_types):
        tasks.setdefault(task, []).append(place)
    picked: list[int] = []
    for turn in range(count):
        for task in sorted(tasks):
            stride = max(1, len(tasks[task]) * len(tasks) // count)
            if turn * stride < len(tasks[task]) and len(picked) < count:
                picked.append(tasks[task][turn * stride])
    return picked


def grid_figure(rows: Mapping[str, Sequence[Sample]]) -> Figure:
    """A figure with a block of pictures below each title. Prompt, reward and plan are under each picture."""
    from matplotlib.figure import Figure

    columns = min(GRID_COLUMNS, max(len(samples) for samples in rows.values()))
    bands: list[tuple[list[str], list[tuple[Sample, str, str]]]] = []  # lines of the title, pictures
    for title, samples in rows.items():
        captioned = [(sample, *_caption(sample)) for sample in samples]
        for start in range(0, len(samples), columns):
            lines = _wrap(title, 24 * columns, 4).split("\n") if title and not start else []
            bands.append((lines, captioned[start : start + columns]))
    heights = []
    for lines, band in bands:
        most = max(f"{head}\n{plan}".count("\n") + 1 for _, head, plan in band)
        heights.append((_TITLE_LINE * len(lines) + 0.15, _LINE * most + 0.2))
    width, top = _PITCH * columns, sum(title + _PICTURE + caption for title, caption in heights)
    figure = Figure(figsize=(width, top))
    height = top

    def axes(left: float, top: float, wide: float, high: float) -> Axes:
        area = figure.add_axes((left / width, (top - high) / height, wide / width, high / height))
        area.axis("off")
        return area

    for (lines, band), (title_height, caption_height) in zip(bands, heights, strict=True):
        for column, (sample, head, plan) in enumerate(band):
            left = _PITCH * column + 0.1
            small = sample.image.shape[0] < _SMALL
            axes(left, top - title_height, _PICTURE, _PICTURE).imshow(
                sample.image, interpolation="nearest" if small else None
            )
            caption = axes(left, top - title_height - _PICTURE - 0.05, _PITCH - 0.1, caption_height - 0.05)
            _write(caption, head, 8, "bold")
            _write(caption, "\n" * len(head.splitlines()) + plan, 8)
        if lines:
            _write(axes(0.1, top - 0.05, width - 0.1, title_height), "\n".join(lines), 11)
        top -= title_height + _PICTURE + caption_height
    return figure


def _caption(sample: Sample) -> tuple[str, str]:
    """Prompt with reward, and plan, both wrapped to the width of a picture."""
    reward = "" if math.isnan(sample.reward) else f"reward {sample.reward:.2f}"
    head = "\n".join(filter(None, (_wrap(sample.prompt, 31, 6), reward)))
    return head, _wrap(sample.plan, 34, 12)  # the 50 words that the planning instruction asks for fit


def _wrap(text: str, width: int, lines: int) -> str:
    """Wrap to at most `lines` lines, and mark a cut. Wide characters (Chinese, Japanese, Korean, emoji) count twice."""
    marked = "".join(c + "\0" * (unicodedata.east_asian_width(c) in "WF") for c in " ".join(text.split()))
    found = textwrap.wrap(marked, width)
    if len(found) > lines:
        found = [*found[: lines - 1], found[lines - 1][: width - 2].rstrip() + " …"]
    return "\n".join(found).replace("\0", "")


def _write(area: Axes, text: str, size: int, weight: str = "normal") -> None:
    """Write text at the upper left corner of an area, which clips it. A dollar sign does not start a formula."""
    text, families = _legible(text, weight)
    area.text(
        0, 1, text, size=size, weight=weight, family=families, va="top", transform=area.transAxes, parse_math=False,
        clip_on=True,
    )  # fmt: skip


def _legible(text: str, weight: str) -> tuple[str, list[str]]:
    """Replace characters that no installed font has by … -> the text, and the font families for it."""
    found = {character: _family_with(character, weight) for character in set(text) - {"\n"}}
    missing = re.escape("".join(character for character, family in found.items() if family is None))
    if missing:
        _say_no_font()
        text = re.sub(f"[{missing}]+", "…", text)
    return text, [_FONT, *sorted({family for family in found.values() if family} - {_FONT})]


@functools.cache
def _say_no_font() -> None:
    from matplotlib import get_cachedir

    tqdm.write(
        "no font on this machine has some characters of the texts: pictures show … (Noto's fonts have most; matplotlib "
        f"finds a new one after {get_cachedir()} is deleted)"
    )


@functools.cache
def _family_with(character: str, weight: str) -> str | None:
    """A font family that has the character in this weight, if possible matplotlib's own; None if there is none."""
    from matplotlib.font_manager import fontManager

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # it would log every missing weight
    families = sorted({font.name for font in fontManager.ttflist if not font.name.startswith(_NO_TEXT)} - {_FONT})
    return next((family for family in (_FONT, *families) if ord(character) in _characters(family, weight)), None)


@functools.cache
def _characters(family: str, weight: str) -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    try:
        path = findfont(FontProperties(family=family, weight=weight), fallback_to_default=False)
        return frozenset(get_font(path).get_charmap())
    except (ValueError, OSError, RuntimeError):  # a font that matplotlib cannot read
        return frozenset()


def draw_grid(rows: Mapping[str, Sequence[Sample]], path: Path) -> None:
    """Write `grid_figure` as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = grid_figure(rows)
    with whole(path) as part:
        figure.savefig(part, dpi=min(100, _MOST_PIXELS / max(figure.get_size_inches())))


def write_report(
    output: Path,
    config: Config,
    summary: Mapping[str, Any],
    heldout: Mapping[str, Sequence[Sample]],
    alarms: Sequence[str] = (),
    names: Sequence[str] = (),
) -> None:
    """Write before_after.png and report.html from metrics.jsonl and the samples in `output`.

    `names` are rewards that the table shows one by one. A part that cannot be drawn is left out; a line says so.
    """
    if heldout:
        with no_failure("no before_after.png"):
            draw_grid({tag: pick(samples) for tag, samples in heldout.items()}, output / "before_after.png")
    saved = saved_samples(output, summary["steps"])[-3:]
    lines = (output / METRICS).read_text().splitlines() if (output / METRICS).exists() else []
    rows = [json.loads(line) for line in lines]
    content = "\n".join(parts_of(rows, asdict(config), summary, heldout, saved, alarms, names))
    with whole(output / "report.html") as part:
        part.write_text(document(output.name, content), encoding="utf-8")


def saved_samples(output: Path, last: int) -> list[Path]:
    """The files with samples of training steps up to step `last`, in order."""
    paths = sorted((output / "samples").glob("step-*.jsonl"))
    return [path for path in paths if (step := path.stem.removeprefix("step-")).isdecimal() and int(step) <= last]


def document(title: str, content: str, head: str = "", script: str = "") -> str:
    """A page that needs no other file."""
    title = html.escape(title)
    return f"""<!doctype html>
<html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>{head}
<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>
<main>{content}</main>{script}</body></html>
"""


def parts_of(
    metrics: Sequence[Mapping[str, float]],
    settings: Mapping[str, Any],
    summary: Mapping[str, Any],
    heldout: Mapping[str, Sequence[Sample]],
    saved: Sequence[Path],
    alarms: Sequence[str],
    names: Sequence[str],
    links: str = "",
) -> Iterator[str]:
    """The parts of a run's page as HTML elements: tables, alarms, curves, links, pictures, settings."""
    evaluated = (
        [{"step": 0, **heldout_metrics(heldout.get("before", ()))}, *metrics] if _keys(metrics, "heldout/") else []
    )
    plots: dict[str, Callable[[], str]] = {
        "Reward": lambda: curves(metrics, ("reward", *_keys(metrics, "reward_by_task/"))),
        "Held-out reward": lambda: curves(evaluated, ("heldout/reward", *_keys(evaluated, "heldout/reward_by_task/"))),
        "Held-out rewards, each": lambda: curves(evaluated, _keys(evaluated, "heldout/rewards/")),
        "Rewards and monitors": lambda: curves(metrics, _keys(metrics, "rewards/", "/mean")),
        "Milliseconds of a step that a reward took": lambda: _reward_times(metrics),
        "KL to the initial model": lambda: curves(metrics, ("kl", "text/kl", "image/kl")),
        "Entropy (nats a token)": lambda: curves(metrics, ("entropy", "text/entropy", "image/entropy")),
        "Diversity in a group": lambda: curves(metrics, ("image_diversity", "plan_diversity")),
        "Seconds of a step, by phase": lambda: bars(metrics, _PHASES),
    }
    if len(metrics) > _RECENT:
        plots[f"Seconds of the last {_RECENT} steps, by phase"] = lambda: bars(metrics[-_RECENT:], _PHASES)
    picked = {tag: pick(samples) for tag, samples in heldout.items()}
    held = {f"Held-out prompts, {' and '.join(heldout)} training": lambda: _pictures(picked)} if heldout else {}
    trained = {f"Training samples, {path.stem}": functools.partial(_saved_pictures, path) for path in saved}

    def sections(parts: Mapping[str, Callable[[], str]]) -> Iterator[str]:
        for title, draw in parts.items():
            with no_failure(f"report.html: no {title!r}"):
                yield _section(title, draw())

    yield _reward_table(heldout, names) + _table(summary)
    yield from (f"<p class='alarm'><strong>{html.escape(alarm)}</strong></p>" for alarm in alarms)
    yield f"<div class='plots'>{''.join(sections(plots)) if metrics else ''}</div>"
    done = "after" in heldout
    yield from (*sections(held if done else {}), links, *sections(trained), *sections({} if done else held))
    if settings:
        shown = html.escape(yaml.safe_dump(dict(settings), sort_keys=False))
        yield f"<details><summary>Settings</summary><pre>{shown}</pre></details>"


def _reward_table(heldout: Mapping[str, Sequence[Sample]], names: Sequence[str]) -> str:
    rows = [
        f"<tr><td>{html.escape(task)}</td>" + "".join(f"<td>{_show(value)}</td>" for value in pair) + "</tr>"
        for task, *pair in reward_rows(heldout.get("before", ()), heldout.get("after", ()), names)
    ]
    head = "<caption>Held-out reward</caption><tr><th></th><th>before</th><th>after</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>" if rows else ""


def _pictures(picked: Mapping[str, Sequence[Sample]]) -> str:
    """A card for each prompt, with its text and a picture for each tag, such as before and after."""
    cards: dict[tuple[int, str], list[str]] = {}
    for tag, samples in picked.items():
        for i, sample in enumerate(samples):
            reward = "" if math.isnan(sample.reward) else f"reward {sample.reward:.2f}"
            scores = [f"{name} {'–' if math.isnan(score) else f'{score:.2f}'}" for name, score in sample.scores.items()]
            texts = (": ".join(filter(None, (tag, reward))), ", ".join(scores) * (len(scores) > 1), sample.plan)
            said = "".join(f"<p>{html.escape(text)}</p>" for text in texts)
            cards.setdefault((i, sample.prompt), []).append(f"<div>{_picture(sample)}{said}</div>")
    figures = [
        f"<figure><figcaption><strong>{html.escape(prompt)}</strong></figcaption>"
        f"<div class='tags'>{''.join(parts)}</div></figure>"
        for (_, prompt), parts in cards.items()
    ]
    return f"<div class='pictures'>{''.join(figures)}</div>"


def _saved_pictures(path: Path) -> str:
    return _pictures({"": load_samples(path)})


def _picture(sample: Sample) -> str:
    from matplotlib.image import imsave

    buffer, small = io.BytesIO(), sample.image.shape[0] < _SMALL
    kind = "png" if small else "jpeg"
    imsave(buffer, sample.image, format=kind)
    data, look = base64.b64encode(buffer.getvalue()).decode(), "class='pixels' " if small else ""
    return f"<img {look}alt='{html.escape(sample.prompt)}' src='data:image/{kind};base64,{data}'>"


def _keys(metrics: Sequence[Mapping[str, float]], prefix: str, suffix: str = "") -> tuple[str, ...]:
    return tuple(sorted({key for row in metrics for key in row if key.startswith(prefix) and key.endswith(suffix)}))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>\n{content}</section>" if content else ""


def _show(value: Any) -> str:
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else html.escape(str(value))


def _table(summary: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><td>{html.escape(key)}</td><td>{_show(value)}</td></tr>" for key, value in summary.items())
    return f"<table>{rows}</table>" if rows else ""


def _reward_times(metrics: Sequence[Mapping[str, float]]) -> str:
    """A table with the mean time of each reward in a step, and the share that was hidden behind other work."""
    times = {}
    for key in _keys(metrics, "rewards/", "/milliseconds"):
        ms, hidden = (sum(row.get(k, 0.0) for row in metrics) / len(metrics) for k in (key, f"{key}_hidden"))
        name = key.removeprefix("rewards/").removesuffix("/milliseconds")
        times[name] = f"{ms:.1f} ms, {hidden / ms if ms else 0:.0%} hidden"
    return _table(times) if times else ""
