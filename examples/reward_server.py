"""Serves any reward, of bicot or your own, over HTTP. rewards/remote.py describes the protocol.

python examples/reward_server.py orm --device cuda --options '{"micro_batch": 4}'
python train.py --rewards.names scene,judge --rewards.options.judge '{url: "http://127.0.0.1:8000", timeout: 60}'
"""

import argparse
import base64
import io
import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bicot.grpo.data import parse_example
from bicot.rewards.config import RewardConfig

parser = argparse.ArgumentParser(description="Serve a reward over HTTP.")
parser.add_argument("reward", help="scene, hps, …, or package.module:Class")
parser.add_argument("--options", type=json.loads, default={}, help="its options, as JSON, such as path and dtype")
parser.add_argument("--device", default="cpu")
parser.add_argument("--port", type=int, default=8000, help="port to listen at; 0 = any free one")
args = parser.parse_args()
config = RewardConfig([args.reward], options={args.reward: args.options})
ensemble, one_at_a_time = config.build(device=args.device), threading.Lock()


def picture(png: str) -> Tensor:
    """[3, H, W] in [0, 1]."""
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).to(args.device) / 255


def scores(images: list[str], plans: list[str], examples: list[dict], **_: object) -> list[float | None]:
    if not images:  # the request before a run
        return []
    asked = [replace(parse_example(row), plan=plan) for row, plan in zip(examples, plans, strict=True)]
    with one_at_a_time:
        found = ensemble.submit(torch.stack([picture(png) for png in images]), asked).result()[:, 0].tolist()
    return [None if score != score else score for score in found]  # NaN = the reward does not apply


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        answer: dict[str, object]
        try:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, answer = 200, {"scores": scores(**asked)}
        except Exception as error:  # not 500: the same request would fail again
            status, answer = 400, {"error": str(error)}
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))  # so that an answer that is cut off is asked for again
        self.end_headers()
        self.wfile.write(body)


with ThreadingHTTPServer(("127.0.0.1", args.port), Handler) as server:
    print(f"{args.reward} is served at http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
