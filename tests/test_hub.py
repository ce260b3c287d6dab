"""Model cards, what plain transformers makes of a checkpoint, and the upload to a server that stands in for the hub."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard, constants
from PIL import Image
from training import run, words

from bicot.grpo.cli import parse_config
from bicot.grpo.hub import push, write_card
from bicot.model.adapters import add_lora
from bicot.model.chunk import RolloutChunk
from bicot.model.engine import RolloutEngine
from bicot.model.policy import PUBLISHED_FREEZE, load_policy
from bicot.model.prompts import PromptFormat
from bicot.model.settings import RolloutSettings, Sampling

ONE_STEP = ("--sample_steps", "0", "--max_steps", "1", "--gradient_accumulation_steps", "1", "--push_to_hub", "true")


class Hub(BaseHTTPRequestHandler):
    """What an upload asks of the hub; it takes every file as a plain one, and `refuses` paths."""

    refuses, created, files = "none", {}, {}  # type: ignore[var-annotated]

    def answer(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(403 if re.search(self.refuses, self.path) else status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        known = self.path in ("/api/whoami-v2", "/api/models/me/painter/auth-check/write")
        self.answer({"name": "me"}, 200 if known else 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            Hub.created = json.loads(body)
            self.answer({"url": f"http://{self.headers['Host']}/me/painter"})
        elif self.path == "/api/validate-yaml":
            self.answer({"warnings": [], "errors": []})
        elif self.path == "/api/models/me/painter/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif self.path == "/api/models/me/painter/commit/main":
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            Hub.files = {file["path"]: base64.b64decode(file["content"]) for file in files}
            url = f"http://{self.headers['Host']}/me/painter/commit/{'0' * 40}"
            self.answer({"success": True, "commitUrl": url, "commitOid": "0" * 40})
        else:
            self.answer({}, 404)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A server, as the hub that this process knows; the test may say what it refuses."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    monkeypatch.setattr(Hub, "refuses", "none")
    yield Hub
    server.shutdown()
    server.server_close()


def test_a_checkpoint_is_pushed_with_its_card_or_later(
    hub: type[Hub], job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first upload fails, the printed command succeeds."""
    output = tmp_path / "painter"
    monkeypatch.setattr(hub, "refuses", "commit")
    assert run(job, output, *ONE_STEP, "--hub_private_repo", "true")["steps"] == 1
    assert hub.created["name"] == "painter" and "private" in json.dumps(hub.created)
    checkpoint = output / "checkpoint-000001"
    *_, why, command = capsys.readouterr().out.splitlines()
    assert why.startswith("push_to_hub failed: ") and why.endswith(f"; push {checkpoint} later with:")
    monkeypatch.setattr(hub, "refuses", "none")
    program, *given = shlex.split(command)
    assert program == "hf"
    hub.files = {}
    environment = os.environ | {"HF_ENDPOINT": constants.ENDPOINT}
    subprocess.run([sys.executable, "-m", "huggingface_hub.cli.hf", *given], check=True, env=environment, timeout=120)
    by_hand, hub.files = hub.files, {}
    push(checkpoint, "me/painter", 1)
    assert f"pushed {checkpoint} to {constants.ENDPOINT}/me/painter" in capsys.readouterr().out
    left = {path.name for path in checkpoint.iterdir()}
    assert hub.files.keys() == left - {"trainer_state.pt", "manifest.json"} and "before_after.png" in left
    assert all(content == (checkpoint / name).read_bytes() for name, content in hub.files.items())
    assert by_hand == hub.files
    card = ModelCard.load(checkpoint / "README.md")
    assert card.data.tags == ["bicot", "grpo", "t2i-r1", "janus"] and card.data.pipeline_tag == "text-to-image"
    assert card.data.library_name == "transformers" and card.data.base_model is None, "it is no model of the hub"
    for line in (
        "- prompts: `train.jsonl`",
        "- rewards: redness:Redness (weight 1)",
        "- steps: 1, each of 2 prompts × 4 samples",
        "| learning_rate | 0.01 | 1e-06 |",
        '    python generate.py "a red circle" --model me/painter',
    ):
        assert line in card.text.splitlines()
    assert (
        "| reward, last step |" in card.text and "output_dir" not in card.text and "{" not in card.text.split("```")[0]
    )


@pytest.mark.skipif(transformers.__version__ < "5.18", reason="transformers 5.17 cannot draw with Janus")
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_cards_code_draws_the_same_picture(
    adapters: bool, guidance: float, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sampling = Sampling(max_completion_length=10, temperature=0.0, image_temperature=0.0, cfg_weight=guidance)
    settings = RolloutSettings(PromptFormat("t2i_r1", "", "plan {}"), sampling)
    policy = load_policy(job / "model", dtype=torch.float32)
    if adapters:
        policy.adapters = add_lora(policy.model, 4, 8, 0.0, ["q_proj", "down_proj"], PUBLISHED_FREEZE).eval()
        policy.adapters.peft_config["default"].base_model_name_or_path = str(job / "model")
        for name, parameter in policy.adapters.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    policy.save_pretrained(tmp_path, settings=settings)
    engine = RolloutEngine(policy, policy.prompt_encoder(settings.prompts))
    chunk = RolloutChunk.cat(list(engine.generate(["a red circle"], 1, sampling, 0)))

    config = parse_config(words(job, tmp_path))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    summary = {"steps": 1, "heldout_reward_before": None, "heldout_reward_after": 0.25}
    write_card(tmp_path, config, asdict(config) | {"prompts_per_step": 4}, summary, None)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == ("peft" if adapters else "transformers")
    assert "| held-out reward after | 0.25 |\n| reward, last step | 0.5 |" in card.text
    (code,) = re.findall("```python\n(.*?)```", card.text, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert scope["plan"] == chunk.plan_texts[0]
    assert torch.equal(scope["tokens"], chunk.image_tokens)
    theirs = (scope["pixels"].permute(2, 0, 1) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(theirs, chunk.images[0], atol=1e-5, rtol=0)
    assert (tmp_path / "picture.png").is_file()


def test_settings_of_a_model_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the cache that a download leaves."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--me--painter" / "snapshots" / ("0" * 40)
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    snapshot.mkdir(parents=True)
    settings = RolloutSettings(PromptFormat("janus", "s", "r {}"), Sampling(cfg_weight=2.0))
    settings.save(snapshot)
    assert RolloutSettings.load("me/painter") == settings
    assert RolloutSettings.load("me/another") == RolloutSettings()


def test_a_license_is_the_base_models_and_curves_are_drawn(job: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\ntags: [x]\n---\n# base\n")
    config = parse_config(words(job, tmp_path, "--model_name_or_path", str(tmp_path / "base")))
    rows = [
        {"step": step, "reward": step / 10, "text/kl": 0.0} | ({"kl": 0.1} if step > 3 else {}) for step in range(12)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    summary = {"steps": 0, "heldout_reward_before": None, "heldout_reward_after": None}
    write_card(tmp_path, config, asdict(config) | {"prompts_per_step": 4}, summary, None)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit" and "](curves.png)" in card.text and "| reward, last step | 1.1 |" in card.text
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (960, 360), "reward and KL; this run has no entropy"


@pytest.mark.parametrize("refused", ["whoami", "create", "auth-check", "closed port", "no token"])
def test_a_hub_that_refuses_is_found_at_the_start(
    refused: str, hub: type[Hub], job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "refuses", refused)
    if refused == "closed port":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    if refused == "no token":
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(OSError, match=r"^push_to_hub: http://127.* does not let this run write to 'me/it'.*") as error:
        run(job, tmp_path / "out", *ONE_STEP, "--hub_model_id", "me/it")
    assert "\n" not in str(error.value) and "hf auth login" in str(error.value)
    assert not (tmp_path / "out").exists()
