"""Grids, the page and trackers, looked at from outside."""

from __future__ import annotations

import json
import math
import sys
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from bicot.grpo.config import Config, RewardConfig
from bicot.grpo.report import _say_no_font, _wrap, draw_grid, grid_figure, pick, write_report
from bicot.grpo.samples import Sample, load_samples, mean_by_task, mean_reward, save_samples
from bicot.grpo.tracking import Log


def sample(i: int, task: str = "color", reward: float = 0.5) -> Sample:
    pixels = np.full((8, 8, 3), 10 * i, np.uint8)
    return Sample(f"prompt {i}", task, "red <b>circle</b> . " * 9, reward, {"scene": reward}, pixels)


def test_samples_survive_the_disk(tmp_path: Path) -> None:
    samples = [sample(0), sample(1, reward=math.nan)]
    save_samples(samples, tmp_path / "s" / "heldout-before")
    loaded = load_samples(tmp_path / "s" / "heldout-before")
    assert [s.prompt for s in loaded] == ["prompt 0", "prompt 1"] and math.isnan(loaded[1].reward)
    assert (loaded[1].image == samples[1].image).all()
    assert load_samples(tmp_path / "none") == []


def test_means_leave_out_missing_rewards() -> None:
    samples = [sample(0), sample(1, reward=1.0), sample(2, reward=math.nan), sample(3, "spatial", 0.0)]
    assert mean_by_task(samples) == {"color": 0.75, "spatial": 0.0}
    assert mean_reward(samples) == 0.5
    assert mean_by_task(samples[2:3]) == {"color": None} and mean_reward(samples[2:3]) is mean_reward([]) is None


@pytest.mark.parametrize("text", ["a$b_$c", "$_$", "a \\foo $\\foo$ circle", "a $5 and 6$ circle", "{}%#&~^_"])
def test_dollars_and_backslashes_are_text(text: str, tmp_path: Path) -> None:
    """In a prompt, a plan or a task type: matplotlib would read them as a formula."""
    one = replace(sample(1, text), prompt=text, plan=text)
    draw_grid({text: [one]}, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").is_file()
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "reward": 0.5, f"reward_by_task/{text}": 0.5, "loss": 0.1}) + "\n"
    )
    write_report(tmp_path, Config(rewards=RewardConfig(["scene"])), {"steps": 1}, {"before": [one]})
    texts = grid_figure({"": [one]}).axes[1].texts
    assert [t.get_text().strip() for t in texts] == [f"{text}\nreward 0.50", text] and not texts[0].get_parse_math()


def test_pick_takes_every_task_type() -> None:
    samples = [sample(i, task) for task in ("color", "object", "spatial") for i in range(10)]
    picked = pick(samples, 7)
    assert len(picked) == 7 and {s.task_type for s in picked} == {"color", "object", "spatial"}
    assert len({(s.task_type, s.prompt) for s in picked}) == 7 and picked == pick(samples, 7)
    assert len(pick(samples[:2], 7)) == 2


def test_grid_shows_every_picture(tmp_path: Path) -> None:
    draw_grid({"before": [sample(i) for i in range(1, 4)], "after": [sample(9, reward=math.nan)]}, tmp_path / "g.png")
    pixels = (matplotlib.image.imread(tmp_path / "g.png")[..., :3] * 255).round().astype(int)
    for grey in (10, 20, 30, 90):
        assert (pixels == grey).all(-1).sum() > 10_000, f"the picture of grey {grey} is missing"


LONG = "a photo of a red circle left of a blue square, " * 8
IN_NO_FONT = "\U0010fffe"


def sizes(figure: Figure) -> set[tuple[float, float]]:
    """Inches of its pictures."""
    width, height = figure.get_size_inches()
    boxes = [axes.get_position() for axes in figure.axes if axes.images]
    return {(round(box.width * width, 6), round(box.height * height, 6)) for box in boxes}


def test_a_plan_of_50_words_is_whole() -> None:
    plan = " ".join(f"wor{i:02d}" for i in range(50))
    axes = grid_figure({"": [replace(sample(1), plan=plan)]}).axes
    assert plan.split() in [text.get_text().split() for each in axes for text in each.texts]


def test_long_texts_are_wrapped_and_cut() -> None:
    one = replace(sample(1), prompt=LONG, plan=LONG)
    figure = grid_figure({LONG: [one, one], "short": [one]})
    assert sizes(figure) == {(2.1, 2.1)}, "no text takes room from the pictures"
    renderer = FigureCanvasAgg(figure).get_renderer()
    for axes in figure.axes:
        for text in axes.texts:
            box, area = text.get_window_extent(renderer), axes.get_window_extent(renderer)
            assert box.x1 <= area.x1 and box.y0 >= area.y0 - 1, text.get_text()
    heads = [text.get_text() for axes in figure.axes for text in axes.texts if text.get_weight() == "bold"]
    assert all(len(head.splitlines()) == 7 and " …\nreward 0.50" in head for head in heads)


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (8, 8), (9, 8), (40, 8)])
def test_pictures_go_into_rows(count: int, columns: int) -> None:
    figure = grid_figure({"a": [sample(1)] * count})
    corners = [axes.get_position().get_points()[0] for axes in figure.axes if axes.images]
    assert len(corners) == count and len({round(x, 6) for x, _ in corners}) == columns
    assert len({round(y, 6) for _, y in corners}) == -(-count // columns) and sizes(figure) == {(2.1, 2.1)}


def test_a_grid_of_any_height_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bicot.grpo.report._MOST_PIXELS", 500)
    draw_grid({str(i): [sample(1)] for i in range(3)}, tmp_path / "g.png")
    assert 499 <= matplotlib.image.imread(tmp_path / "g.png").shape[0] <= 500


@pytest.mark.parametrize(
    "text", ["日本の赤いりんご", "a 🍎 and 👩‍🚀", "Ⓐ ⌢", "нет ελ", "a\x00\x07b\u3000c\u2028d", f"x{IN_NO_FONT}y"]
)
def test_every_character_has_a_glyph(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In the weight that it is written in; what no font here has is left out, and that is said once."""
    _say_no_font.cache_clear()
    figure = grid_figure({text: [replace(sample(1), prompt=text, plan=text)]})
    written = [text for axes in figure.axes for text in axes.texts]
    for each in written:
        fonts = [
            get_font(findfont(FontProperties(family=family, weight=each.get_weight())))
            for family in each.get_fontfamily()
        ]
        assert set(map(ord, each.get_text())) - {10} <= {code for font in fonts for code in font.get_charmap()}
    expected = {"Ⓐ ⌢": "Ⓐ ⌢", "нет ελ": "нет ελ", f"x{IN_NO_FONT}y": "x…y"}
    assert written[-1].get_text() == expected.get(text, written[-1].get_text())
    lost = any("…" in each.get_text() for each in written)
    assert capsys.readouterr().out.count("no font on this machine") == lost


def test_wide_characters_take_two_columns() -> None:
    lines = _wrap("日本の赤い" * 20, 20, 3).split("\n")
    assert [len(line) for line in lines] == [10, 10, 11] and lines[-1].endswith(" …")


class Page(HTMLParser):
    """The texts of a page by the tags around them, and the attributes of its elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1], data))


def test_page_is_readable(tmp_path: Path) -> None:
    """On a phone too: it folds; prompts, rewards and plans are text, and the pictures hold none."""
    prompt = "a <i>red</i> 🍎 & $5"
    before, after = (replace(sample(1, "a<b", reward), prompt=prompt) for reward in (0.25, 0.75))
    save_samples([replace(sample(2), prompt="trained on")], tmp_path / "samples" / "step-000004")
    save_samples([replace(sample(3), prompt="of a later step")], tmp_path / "samples" / "step-000006")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 4, "reward": 0.5}) + "\n")
    config, heldout = Config(rewards=RewardConfig("scene")), {"before": [before], "after": [after]}
    write_report(tmp_path, config, {"steps": 4}, heldout)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not page.open, "every element is closed"
    viewport = next(values["content"] for tag, values in page.elements if tag == "meta" and values.get("name"))
    assert viewport == "width=device-width, initial-scale=1"
    texts = [text for _, text in page.texts]
    assert ("strong", prompt) in page.texts and texts.count(prompt) == 1, "both pictures stand under it"
    assert "before: reward 0.25" in texts and "after: reward 0.75" in texts and texts.count(before.plan) == 3
    cells = [text for tag, text in page.texts if tag in ("th", "td")]
    assert cells[:8] == ["before", "after", "a<b", "0.250", "0.750", "all", "0.250", "0.750"]
    assert ("strong", "trained on") in page.texts and "of a later step" not in texts
    pixels = [values["src"] for tag, values in page.elements if tag == "img" and "image/png" in str(values["src"])]
    shapes = {matplotlib.image.imread(BytesIO(b64decode(str(source).split(",")[1]))).shape[:2] for source in pixels}
    assert len(pixels) == 3 and shapes == {(8, 8)}


def test_what_cannot_be_drawn_is_said_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "reward": 0.5, "rewards/a/milliseconds": 3.0}) + "\n"
    )
    for name in ("figure", "image"):  # as if it were not installed
        monkeypatch.setitem(sys.modules, f"matplotlib.{name}", None)
    write_report(tmp_path, Config(rewards=RewardConfig("scene")), {"steps": 1}, {"before": [sample(1)]})
    said = capsys.readouterr().out.splitlines()
    assert "report.html: no 'Held-out prompts, before training': ModuleNotFoundError:" in said[1]
    assert "no before_after.png: " in said[0] and len(said) == 2
    page = (tmp_path / "report.html").read_text()
    assert "<td>color</td><td>0.500</td><td>–</td>" in page and "3.0 ms" in page


def test_page_is_self_contained_and_escapes_text(tmp_path: Path) -> None:
    rows = [{"step": i, "reward": 0.1 * i, "seconds/draw": 1.0, "reward_by_task/a<b": 0.2} for i in range(1, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config(rewards=RewardConfig("scene"), train_file="<script>")
    write_report(tmp_path, config, {"heldout_reward_before": None, "steps": 4}, {"before": [sample(0)]})
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "http" not in page.split("<style>")[1].replace("http://www.w3.org", "").replace("https://matplotlib.org", "")
    assert page.count("<h2>") == 3 and page.count("<svg ") == 2 and page.count("data:image/") == 1
    assert (tmp_path / "before_after.png").is_file()


def test_tensorboard_gets_numbers_and_grids(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    draw_grid({"a": [sample(1)]}, tmp_path / "g.png")
    log = Log(Config(rewards=RewardConfig("scene"), output_dir=str(tmp_path), report_to=["tensorboard"]), 0)
    log.write(1, {"reward": 0.25, "entropy": 1.0, "rewards/x": math.nan}, tmp_path / "g.png")
    log.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Scalars("reward")[0].value == 0.25 and events.Tags()["images"] == ["samples"]
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "reward": 0.25, "entropy": 1.0}
