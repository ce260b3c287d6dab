"""What best-of-N finds on the toy, and whether it pays to drop the worse half of the half-drawn pictures.

python -m bicot.bench.best_of CHECKPOINT ... [--output bench/results/best_of.json]
Those that go on are what they would have been anyway: every way is judged on the same 16 pictures of each prompt.
"""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..grpo.data import load_examples
from ..grpo.rollout import roll_out
from ..model.generation import Policy
from ..rewards.config import RewardConfig
from .harness import finish, hardware

HELDOUT = Path(__file__).resolve().parent.parent / "toy" / "assets" / "heldout.jsonl"
N, NUMBERS, SEEDS = 16, (1, 4, 8, 12, 16), (0, 1, 2)
FILLS = {"half dropped, after greedy filling": 125, "after repeating the last row": 75}  # % of N pictures' decode steps


def fill_greedily(policy: Policy) -> list[Tensor]:
    """From now on half-drawn pictures are drawn to their end greedily, and then as ever -> where the former are put."""
    engine, run, filled, steps = policy.engine, policy.engine.graphs.run, [], itertools.count(1)

    def watched(key: Any, step: Any, block: int) -> None:
        run(key, step, block)
        half = policy.num_image_tokens // 2
        if key[0] == "image" and (stage := engine.image_stage) and next(steps) % (2 * half) == half:
            state, x = stage.state.clone(), stage.x.clone()
            for _ in range(half):
                stage._step(key[1], stage.sequences_per_sample * key[1], replace(key[2], image_temperature=0.0))
            filled.append(stage._drawn(stage.tokens, key[1]).clone())
            stage.state.copy_(state), stage.x.copy_(x)

    engine.graphs.run = watched  # type: ignore
    return filled


def measure(policy: Policy, seed: int, greedy: list[Tensor], most: int | None = None) -> dict[str, float]:
    """Way -> mean over the (first `most`) held-out prompts of the best score that it finds."""
    greedy.clear()
    scene, sampling = RewardConfig("scene").build(), policy.settings.sampling
    rollout, each, handle = roll_out(policy.engine, scene, load_examples(HELDOUT)[:most], N, sampling, seed)
    whole, half = handle.result().view(-1, N), policy.num_image_tokens // 2
    drawn, side = rollout.image_tokens[:, :half], int((2 * half) ** 0.5)
    filled = (torch.cat(greedy), torch.cat([drawn, drawn[:, -side:].repeat(1, half // side)], 1))
    guesses = [scene.submit(policy.engine.weights.image_decoder(tokens), each).result() for tokens in filled]
    best = {f"best of {n}": whole[:, :n].amax(1).mean().item() for n in NUMBERS}
    kept = [whole.gather(1, guess.view(-1, N).topk(N // 2).indices) for guess in guesses]
    return best | {fill: some.amax(1).mean().item() for fill, some in zip(FILLS, kept, strict=True)}


def table(scores: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Checkpoint -> what `measure` found, seed by seed; a row for each way, with its mean."""
    costs = {**{f"best of {n}": 100 * n // N for n in NUMBERS}, **FILLS}
    rows = [
        [way, str(cost), *(f"{sum(run[way] for run in runs) / len(runs):.4f}" for runs in scores.values())]
        for way, cost in costs.items()
    ]
    return {"header": ["way", "decode steps, %", *scores], "rows": rows, "notes": []}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--output", type=Path)
    args, scores = parser.parse_args(), {}
    for path in args.checkpoints:
        greedy = fill_greedily(policy := Policy.from_pretrained(path, device="cpu"))
        scores[path] = [measure(policy, seed, greedy) for seed in SEEDS]
    said = {"title": "Best of N", "about": f"Mean best score of the toy's held-out prompts, {len(SEEDS)} seeds."}
    said["command"] = f"python -m bicot.bench.best_of {' '.join(scores)}"
    finish({"bench": "tables", **said, **hardware(), "tables": [table(scores)]}, args.output)
