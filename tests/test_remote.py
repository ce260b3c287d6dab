"""Rewards behind HTTP: the example server in a process of its own, and servers that fail in every way."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from serving import SERVED, example_server

from bicot.rewards import remote
from bicot.rewards.base import Example, NumeracyInfo, SpatialInfo, Unavailable
from bicot.rewards.check import check
from bicot.rewards.config import RewardConfig
from bicot.rewards.remote import HttpReward
from bicot.rewards.worker import RewardError

EXAMPLES = [
    Example("two cats", "numeracy", ("cat",), numeracy_info=(NumeracyInfo(2, "cat"),), plan="Zwei Kätzchen \ud83d"),
    Example("it rains", "non", plan="rain"),
    Example("a dog left of a cat", "spatial", ("dog",), spatial_info=SpatialInfo("dog", "cat", "left of")),
    Example("a red cat", "color", ("cat",), ("red cat",), metadata={"weight": 0.1, "deep": [{"a": None}]}, plan="a\nb"),
] * 2
IMAGES = torch.randint(0, 256, (8, 3, 33, 33), generator=torch.Generator().manual_seed(0)) / 255  # as an 8-bit picture


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with example_server(tmp_path_factory.mktemp("server")) as (url, _):
        yield url


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "served.py").write_text(SERVED)
    monkeypatch.syspath_prepend(tmp_path)
    return "served:Everything"


def config(url: str, **options: Any) -> RewardConfig:
    placed = {key: options.pop(key) for key in ("schedule", "on_reward_error", "monitor") if key in options}
    return RewardConfig("judge", options={"judge": {"url": url, **options}}, **placed)


@pytest.mark.parametrize("schedule", ["serial", "threads"])
@pytest.mark.parametrize("micro_batch", [3, 16])
def test_scores_are_those_of_the_reward_here(served: str, local: str, schedule: Any, micro_batch: int) -> None:
    both = config(served, schedule=schedule, micro_batch=micro_batch, monitor=[local])
    both.options[local] = {"micro_batch": micro_batch}
    scores = both.build().submit(IMAGES, EXAMPLES).result()
    assert scores[[1, 5]].isnan().all() and not scores[[0, 2, 3, 4, 6, 7]].isnan().any()
    assert torch.equal(scores[:, 0].nan_to_num(-1), scores[:, 1].nan_to_num(-1))
    assert len(scores[:, 0].unique()) == 8


def test_a_sample_that_the_server_cannot_score(served: str, tmp_path: Path) -> None:
    examples = [EXAMPLES[0], replace(EXAMPLES[0], prompt="fails"), EXAMPLES[2]]
    message = f"reward 'judge' failed on 'fails' .*: {served} answers 400 Bad Request: .*no such noun"
    with pytest.raises(RewardError, match=message):
        config(served).build(failures=tmp_path).submit(IMAGES[:3], examples).result()
    handle = config(served, on_reward_error="skip").build().submit(IMAGES[:3], examples)
    assert handle.result()[:, 0].isnan().tolist() == [False, True, False]
    assert handle.metrics["rewards/judge/skipped"] == 1


def test_a_server_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    with example_server(tmp_path) as (url, process):
        stops, skips = config(url).build(failures=tmp_path), config(url, on_reward_error="skip", micro_batch=3).build()
        assert not stops.submit(IMAGES[:1], EXAMPLES[:1]).result().isnan().any()
        process.kill()
        process.wait()
        message = rf"reward 'judge' failed on 'two cats' \(picture.*\): {url} cannot be reached: .* \(tries: 4\)"
        with pytest.raises(RewardError, match=message):
            stops.submit(IMAGES, EXAMPLES).result()
        handle = skips.submit(IMAGES, EXAMPLES)
        assert handle.result().isnan().all() and handle.metrics["rewards/judge/skipped"] == 8
        for on_reward_error in ("raise", "skip"):  # before a run it is never skipped
            with pytest.raises(Unavailable, match=f"reward 'judge': {url} cannot be reached: .*refused"):
                config(url, on_reward_error=on_reward_error).build()
        rows, failed = check(config(url, retries=0), 4, "cpu")
        assert not rows and str(failed["judge"]).endswith("(tries: 1)")


Answer = tuple[int, str]


class Scripted:
    """A server that gives the answers it is told, the last one again and again, and keeps what it was asked."""

    def __init__(self, *answers: Answer, delay: float = 0.0) -> None:
        self.answers, self.delay, self.asked = list(answers), delay, list[dict[str, Any]]()
        script = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, body = 200, '{"scores": []}'
                if asked["images"]:
                    script.asked.append(asked)
                    time.sleep(script.delay)
                    status, body = script.answers[0]
                    del script.answers[: len(script.answers) > 1]
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", "http://elsewhere.invalid/")
                self.end_headers()
                self.wfile.write(body.encode())

            do_GET = do_POST

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/score"

    def __enter__(self) -> Scripted:
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


GOOD = (200, '{"scores": [1, null, 0.25]}')


def test_what_is_sent() -> None:
    with Scripted(GOOD) as server:
        reward = HttpReward("judge", server.url)
        noise = torch.rand(3, 3, 5, 7) * 1.2 - 0.1
        scores = reward.score(noise, EXAMPLES[1:4])
    torch.testing.assert_close(scores, torch.tensor([1.0, torch.nan, 0.25]), equal_nan=True)
    (asked,) = server.asked
    assert list(asked) == ["images", "prompts", "plans", "examples"]
    assert asked["prompts"] == ["it rains", "a dog left of a cat", "a red cat"] and asked["plans"] == [
        "rain",
        "",
        "a\nb",
    ]
    assert asked["examples"][2] == {
        "prompt": "a red cat", "task_type": "color", "nouns": ["cat"], "attr_nouns": ["red cat"], "spatial_info": None,
        "numeracy_info": [], "weight": 0.1, "deep": [{"a": None}],
    }  # fmt: skip
    assert asked["examples"][1]["spatial_info"] == {"obj1": "dog", "obj2": "cat", "locality": "left of"}
    for png, picture in zip(asked["images"], noise, strict=True):
        pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(png, validate=True)))))
        assert pixels.shape == (5, 7, 3) and pixels.dtype == torch.uint8
        torch.testing.assert_close(pixels.permute(2, 0, 1) / 255, picture.clamp(0, 1), atol=0.5001 / 255, rtol=0)


@pytest.mark.parametrize("status", [500, 503, 429])
def test_it_asks_again(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.05)
    with Scripted((status, "busy"), (status, "busy"), GOOD) as server:
        reward = HttpReward("judge", server.url, retries=2)
        start = time.perf_counter()
        assert reward.score(IMAGES[:3], EXAMPLES[:3])[2] == 0.25
        assert time.perf_counter() - start > 0.15 and len(server.asked) == 3
    with Scripted((status, "too\nbusy")) as server:
        reward = HttpReward("judge", server.url, retries=1)
        with pytest.raises(Unavailable, match=rf"{server.url} answers {status} .*: too busy \(tries: 2\)"):
            reward.score(IMAGES[:3], EXAMPLES[:3])
        assert len(server.asked) == 2


def test_a_slow_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    with Scripted(GOOD, delay=0.6) as server:
        ensemble = config(server.url, timeout=0.2, retries=1, on_reward_error="skip").build()
        handle = ensemble.submit(IMAGES[:3], EXAMPLES[:3])
        assert handle.result().isnan().all() and handle.metrics["rewards/judge/skipped"] == 3
        assert [len(asked["images"]) for asked in server.asked] == [3, 3]  # no sample is tried alone
        with pytest.raises(RewardError, match=rf"{server.url} gives no answer within 0\.2 s \(tries: 2\)"):
            config(server.url, timeout=0.2, retries=1).build().submit(IMAGES[:3], EXAMPLES[:3]).result()


def test_answers_that_drip_or_are_cut_off_or_never_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "LONGEST_ANSWER", 2**20)
    body = GOOD[1].encode()

    def answer(server: socket.socket, length: int, parts: list[bytes], pause: float) -> None:
        connection, _ = server.accept()
        with connection, contextlib.suppress(OSError):
            asked = b""
            while not asked.endswith(b'"examples": []}') and (part := connection.recv(2**20)):
                asked += part  # an unread rest would reset the connection
            connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n".encode())
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)

    for length, parts, pause, kind, message in (
        (len(body), [bytes([byte]) for byte in body], 0.3, Unavailable, "gives no answer within 0.5 s"),
        (len(body), [body[:9]], 0, Unavailable, "cannot be reached: IncompleteRead"),
        (2**30, [b" " * 2**18] * 10, 0, ValueError, "answers with more than 1 MiB"),
    ):
        with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as thread:
            thread.submit(answer, server, length, parts, pause)
            start = time.perf_counter()
            with pytest.raises(kind, match=message):
                HttpReward("judge", f"http://127.0.0.1:{server.getsockname()[1]}", timeout=0.5, retries=0)
            assert time.perf_counter() - start < 4


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (400, "", "answers 400 Bad Request$"),
        (404, "nothing\n\nhere " * 99, "answers 404 Not Found: nothing here nothing .{170,180}$"),
        (302, "", "answers 302 Found, a redirect to http://elsewhere.invalid/$"),
        (307, "", "answers 307 Temporary Redirect, a redirect to http://elsewhere.invalid/$"),
        (200, "", "does not answer with JSON: b''"),
        (200, "<html>", "does not answer with JSON: b'<html>'"),
        (200, "[" * 100_000, "does not answer with JSON: b'\\[\\["),
        (200, "[1, 2, 3]", r'must answer {"scores": \[...\]}, not .*1, 2, 3'),
        (200, '{"score": [1, 2, 3]}', r'must answer {"scores": \[...\]}'),
        (200, '{"scores": 3}', r'must answer {"scores": \[...\]}'),
        (200, '{"scores": [1, 2]}', "answers 2 scores for 3 pictures"),
        (200, '{"scores": [1, 2, 3, 4]}', "answers 4 scores for 3 pictures"),
        (200, '{"scores": [1, "2", 3]}', "answers '2' as a score, which must be a finite number or null"),
        (200, '{"scores": [1, true, 3]}', "answers True as a score"),
        (200, '{"scores": [1, [2], 3]}', r"answers \[2\] as a score"),
        (200, '{"scores": [1, NaN, 3]}', "answers nan as a score"),
        (200, '{"scores": [1, -Infinity, 3]}', "answers -inf as a score"),
        (200, '{"scores": [1, 1e39, 3]}', r"answers 1e\+39 as a score"),
        (200, '{"scores": [1, 1' + "0" * 999 + ", 3]}", "answers 10000"),
    ],
)
def test_answers_that_are_wrong(status: int, body: str, message: str) -> None:
    with Scripted((status, body)) as server:
        reward = HttpReward("judge", server.url)
        with pytest.raises(ValueError, match=server.url + " " + message):
            reward.score(IMAGES[:3], EXAMPLES[:3])
        assert len(server.asked) == 1


def test_a_server_of_another_kind_is_found_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"welcome")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        with pytest.raises(ValueError, match="reward 'judge': http://127.* does not answer with JSON: b'welcome'"):
            config(f"http://127.0.0.1:{server.server_port}").build()
        server.shutdown()


def test_names_and_options() -> None:
    for options, message in [
        ({"url": "localhost:8000"}, "reward 'judge': url='localhost:8000' must be like http://"),
        ({"url": "ftp://a/b"}, "must be like http://"),
        ({"url": "http://"}, "must be like http://"),
        ({"url": "http://a:port/"}, "must be like http://"),
        ({"url": "http://a/b c"}, "must be like http://"),
        ({"url": "http://été/"}, "must be like http://"),
        ({"url": 8000}, "url=8000 must be like http://"),
        ({"url": "http://a", "timeout": 0}, "timeout=0 must be seconds"),
        ({"url": "http://a", "timeout": "30 s"}, "timeout='30 s' must be seconds"),
        ({"url": "http://a", "timeout": float("nan")}, "timeout=nan must be seconds"),
        ({"url": "http://a", "retries": -1}, "retries=-1 must be a whole number"),
        ({"url": "http://a", "retries": 1.5}, "retries=1.5 must be a whole number"),
        ({"url": "http://a", "retry": 1}, "reward 'judge': got an unexpected .*'retry'; it takes .*url: .*retries"),
        ({"timeout": 3}, "unknown reward 'judge'; built in .* a server needs a url in rewards.options"),
    ]:
        with pytest.raises(ValueError, match=message):
            RewardConfig("judge", options={"judge": options}).build()
    unused = RewardConfig("scene", options={"judge": {"url": "http://a"}})  # as options of rewards not chosen now are
    assert unused.build().names == ["scene"]
    with Scripted(GOOD) as server:  # a built-in reward may be elsewhere, too
        ensemble = RewardConfig("orm", options={"orm": {"url": server.url}}).build()
        assert ensemble.names == ["orm"] and ensemble.submit(IMAGES[:3], EXAMPLES[:3]).result()[2, 0] == 0.25
