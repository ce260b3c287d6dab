"""The live view in a browser, and who may read it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

import numpy as np
import pytest
from chromium import Chromium
from tiny import wait_until

from bicot.grpo.cli import parse
from bicot.grpo.config import Config, RewardConfig
from bicot.grpo.samples import Sample, save_samples
from bicot.grpo.tracking import Log
from bicot.grpo.view import Run, listen, serve, viewing

TOKEN, EVIL = "a-token", "<script>alert(1)</script>"
ALARM = f"alarm after step 2: {EVIL}"
PROGRAM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
LONG = f"{EVIL} {'a-word-without-an-end' * 9} "


def row(step: int) -> dict[str, float]:
    phases = {f"seconds/{name}": 0.25 * step for name in ("plan", "draw", "train")}
    return {"reward": 0.1 * step, f"reward_by_task/{EVIL}": 0.5, "kl": 0.001 * step, **phases}


def write(run: Path, *steps: int) -> None:
    log = Log(Config(rewards=RewardConfig("scene"), output_dir=str(run)), 0)
    for step in steps:
        log.write(step, row(step))
    log.close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run of this process, after three of ten steps."""
    folder = tmp_path / f"run {EVIL.replace('/', '')}"
    for step in (1, 2):
        scores = {"scene": 0.25 * step, "monitor": float("nan")}
        samples = [
            Sample(LONG, "color", f"plan of step {step} {LONG}", 0.25 * step, scores, np.zeros((8, 8, 3), np.uint8))
        ]
        save_samples(samples, folder / "samples" / f"step-{step:06d}")
    save_samples(samples, folder / "samples" / "heldout-before")
    (folder / ".lock").write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    about = {"settings": {"max_steps": 10, "train_file": EVIL}, "alarms": [ALARM], "heldout": []}
    (folder / "run.json").write_text(json.dumps(about))
    write(folder, 1, 2, 3)
    return folder


@pytest.fixture
def port(run: Path) -> Iterator[int]:
    with listen(0) as listening:
        threading.Thread(target=serve, args=(run, listening.fileno(), TOKEN), daemon=True).start()
        yield listening.getsockname()[1]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    if PROGRAM is None:
        pytest.skip("no Chromium on this machine")
    chromium = Chromium(PROGRAM, tmp_path_factory.mktemp("chromium"))
    yield chromium
    chromium.close()


def ask(port: int, path: str = f"/?token={TOKEN}", method: str = "GET", **headers: str) -> tuple[HTTPResponse, str]:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer, text


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_the_run(browser: Chromium, port: int, width: int, dark: bool) -> None:
    browser.look(f"http://127.0.0.1:{port}/?token={TOKEN}", width, dark=dark)
    text = browser.value("document.body.innerText")
    shown = (
        "Running, step 3 of 10 done",
        ALARM,
        f"plan of step 2 {EVIL}",
        "reward 0.50",
        "scene 0.50, monitor –",
        EVIL,
    )
    for words in (*shown, "Seconds of a step, by phase", "draw 0.75", "reward 0.3", "s ago"):
        assert words in text, words
    assert browser.value("document.querySelectorAll('main script, main iframe').length") == 0
    assert browser.value("document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than the screen"
    labels = browser.value("[...document.querySelectorAll('svg')].map(svg => svg.getAttribute('aria-label'))")
    assert f"last step: reward 0.3, {EVIL} 0.5" in labels
    assert browser.value("[...document.images].every(image => image.naturalWidth === 8 && image.alt.length > 0)")
    luminance = "getComputedStyle(document.querySelector('text')).fill.match(/\\d+/)[0] > 128"
    assert browser.value(luminance) == dark, "text is light on dark, dark on light"
    assert browser.said == [], "no script ran that should not, none failed, and nothing was loaded from elsewhere"


def test_new_steps_appear_without_moving_the_page(browser: Chromium, port: int, run: Path) -> None:
    browser.look(f"http://127.0.0.1:{port}/?token={TOKEN}", 360)
    browser.value("document.querySelector('details').open = true; scrollTo(0, 900)")
    browser.wait("scrollY === 900")
    write(run, 4)
    browser.wait("document.body.innerText.includes('step 4 of 10 done')")
    assert browser.value("document.querySelectorAll('.plots svg').length") == 3
    assert browser.value("scrollY") == 900 and browser.value("document.querySelector('details').open")
    (run / "metrics.jsonl").unlink()  # a run that goes on from an earlier step writes it anew
    write(run, 1)
    browser.value("refresh()")  # sooner
    browser.wait("document.body.innerText.includes('step 1 of 10 done')")
    assert "plan of step 1" in browser.value("document.body.innerText") and browser.said == []


def test_samples_of_an_earlier_step(browser: Chromium, port: int) -> None:
    """By a link, which the keyboard reaches."""
    browser.look(f"http://127.0.0.1:{port}/?token={TOKEN}", 1280)
    browser.value("document.querySelector('nav a').focus()")
    assert browser.value("document.activeElement.textContent") == "1"
    for kind in ("keyDown", "keyUp"):
        browser.tell(
            "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
        )
    browser.wait("location.search.includes('step-000001') && document.readyState === 'complete'")
    text = browser.value("document.body.innerText")
    assert "plan of step 1" in text and "plan of step 2" not in text.split("Held-out prompts")[0]


def test_requests_without_the_token_are_refused(port: int) -> None:
    for path in ("/", "/?token=", "/?token=a-tokem", "/?token=%C3%A9", "/other", f"/?x={TOKEN}"):
        answer, text = ask(port, path)
        assert answer.status == 403 and "run" not in text, path
    for host in ("evil.example", "evil.example:80", f"127.0.0.1.evil.example:{port}", "", "127.0.0.1@evil.example"):
        assert ask(port, Host=host)[0].status == 403, host
    for host in (f"localhost:{port}", "localhost:9999", "127.0.0.1"):  # another port leads here through ssh
        assert ask(port, Host=host)[0].status == 200, host
    assert ask(port, f"/run.json?token={TOKEN}")[0].status == ask(port, f"/../x?token={TOKEN}")[0].status == 404
    assert {ask(port, method=method)[0].status for method in ("POST", "PUT", "DELETE", "OPTIONS")} == {405}
    with listen(0) as listening:
        assert listening.getsockname()[0] == "127.0.0.1", "other machines do not reach it"


def test_the_page_loads_nothing_from_elsewhere(port: int) -> None:
    answer, text = ask(port)
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert answer.headers["Referrer-Policy"] == "no-referrer" and answer.headers["X-Content-Type-Options"] == "nosniff"
    assert text.count("<script>") == 1 and text.count("&lt;script&gt;alert(1)") >= 5
    again, nothing = ask(port, If_None_Match=answer.headers["ETag"])
    assert again.status == 304 and nothing == ""


def test_the_page_says_how_far_the_run_is(run: Path) -> None:
    view, metrics = Run(run), run / "metrics.jsonl"
    with open(metrics, "a") as file:
        file.write('{"step": 4, "rew')
    assert "<p>Running, step 3 of 10 done." in view.page(TOKEN), "half a line is none"
    with open(metrics, "a") as file:
        file.write('ard": 0.5}\n\xff\n[]\n')
    assert "<p>Running, step 4 of 10 done." in view.page(TOKEN)
    stamp = view.stamp()
    (run / ".lock").write_text("process 4194305 on another machine\n")
    assert view.stamp() != stamp
    assert "<p>At step 4 of 10; the run was killed, or is on another machine." in view.page(TOKEN)
    (run / "summary.json").write_text(json.dumps({"steps": 4, "seconds": 12.5}))
    assert "<p>Stopped after step 4 of 10." in (page := view.page(TOKEN)) and "<td>12.500</td>" in page
    (run / "run.json").write_text(json.dumps({"settings": {"max_steps": 4}}))
    assert "<p>Finished after step 4 of 4." in view.page(TOKEN)
    (run / ".lock").write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    later = time.time() + 1
    os.utime(metrics, (later, later))  # the run goes on from there
    assert "<p>Running, step 4 of 4 done." in view.page(TOKEN)
    for path in (*run.glob("*.json*"), *(run / "samples").iterdir()):
        path.unlink()
    assert "<p>Running, step 0 done.</p>" in view.page(TOKEN) and "Reward</h2>" not in view.page(TOKEN)


def test_a_long_run_stays_light(run: Path) -> None:
    """And no peak is lost."""
    rows = [{"step": i, "reward": 9.0 if i == 1234 else 0.5, "seconds/draw": 1.0} for i in range(1, 20_001)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    view = Run(run)
    begun = time.process_time()
    page = view.page(TOKEN)
    assert time.process_time() - begun < 5 and len(page) < 100_000
    raw = page.split("class='raw c0'")[1].split("d='M")[1].split("h0'")[0]
    heights = [float(point.split()[1]) for point in raw.split("L")]
    assert len(heights) <= 300 and min(heights) < 20 < 190 < sorted(heights)[1]


BESIDE = """
import sys, time
from bicot.grpo.view import viewing
with viewing(sys.argv[1], 0):
    time.sleep(600)
"""


def gone(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return True
    return False


def test_the_view_of_a_job_ends_with_it(run: Path) -> None:
    """However the job ends. Ctrl-C stops the job, not the view."""
    job = subprocess.Popen([sys.executable, "-c", BESIDE, str(run)], stdout=subprocess.PIPE, text=True)
    assert job.stdout
    said = job.stdout.readline()
    place, _, path = said.removeprefix("live view: http://127.0.0.1:").strip().partition("/")
    answer, text = ask(int(place), f"/{path}")
    assert answer.status == 200 and "step 3 of 10" in text and len(path) > 40
    job.kill()
    job.wait()
    wait_until(lambda: gone(int(place)))
    job.stdout.close()


def test_the_command(run: Path) -> None:
    """Beside a run or after it; what is wrong is one line."""
    with listen(0) as taken:
        port = str(taken.getsockname()[1])
        for words, line in (
            (
                [str(run), "--port", port],
                f"error: the live view cannot use port {port} (Address already in use); 0 takes",
            ),
            ([str(run.parent)], f"error: {run.parent} is not the folder of a run: it has no metrics.jsonl"),
        ):
            done = subprocess.run([sys.executable, "-m", "bicot.view", *words], capture_output=True, text=True)
            assert done.returncode == 1 and done.stderr.startswith(line) and done.stderr.count("\n") == 1, done.stderr


def test_there_is_no_view_unless_asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert [parse(words)[1].view for words in ([], ["--view"], ["--view", "8000"])] == [None, 0, 8000]
    monkeypatch.setenv("RANK", "1")
    for port in (None, 0):
        with viewing("nowhere", port):
            pass
    assert capsys.readouterr().out == ""
