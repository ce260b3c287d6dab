"""Prompts in, plans and pictures out, from any checkpoint in Hugging Face layout.

    python generate.py "a red circle left of a blue square"                              # the toy
    python generate.py "a red circle" --model outputs/toy/checkpoint-000150              # what you trained
    python generate.py "a photo of a cat" --model deepseek-community/Janus-Pro-1B --dtype bfloat16

Writes one grid (PNG) with each prompt above its pictures and the plans under them, each picture by itself beside it,
and prints the plans.
Prompt texts and sampling are those of the checkpoint's bicot.json, or the published ones; options override them.
"""

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import torch
from transformers.utils import logging

from bicot.grpo.errors import one_line_errors
from bicot.grpo.evaluate import Sample, to_pixels
from bicot.grpo.report import draw_grid
from bicot.model.engine import RolloutChunk, RolloutEngine
from bicot.model.policy import load_policy
from bicot.model.settings import RolloutSettings

TOY = Path(__file__).resolve().parent / "toy" / "assets"
SAMPLING_OPTIONS = {
    "cfg_weight": (float, "classifier-free guidance of the picture, 1 = none"),
    "temperature": (float, "of the plan, 0 = greedy"),
    "top_k": (int, "of the plan, 0 = all tokens"),
    "image_temperature": (float, "of the picture, 0 = greedy"),
    "max_completion_length": (int, "most tokens of the plan"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint draws, and how; evaluate.py has them too."""
    parser.add_argument("--model", default=str(TOY), help="checkpoint or adapter folder, or hub id (default: the toy)")
    for name, (kind, text) in SAMPLING_OPTIONS.items():
        parser.add_argument(f"--{name}", type=kind, help=f"{text} (default: the checkpoint's)")
    parser.add_argument("--chat_template", choices=["t2i_r1", "janus"], help="(default: the checkpoint's)")
    parser.add_argument("--system_prompt", help="of the planning prompt (default: the checkpoint's)")
    parser.add_argument(
        "--reasoning_prompt_path", help="file with the planning instruction (default: the checkpoint's)"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--debug", action="store_true", help="show where an error came from")


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program where one of `add_options`, or --num_generations, has no such value."""
    if args.num_generations is not None and args.num_generations < 1:
        parser.error(f"--num_generations {args.num_generations} must be at least 1")
    for name, least in (("max_completion_length", 1), ("temperature", 0), ("image_temperature", 0), ("top_k", 0)):
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf:
            parser.error(f"--{name} {value} must be a number that is at least {least}")
    if args.cfg_weight is not None and not math.isfinite(args.cfg_weight):
        parser.error(f"--cfg_weight {args.cfg_weight} must be finite")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Plan and draw pictures from prompts.", allow_abbrev=False)
    parser.add_argument("prompts", nargs="+", help="one or more prompts")
    parser.add_argument("--num_generations", type=int, default=4, help="pictures of each prompt")
    add_options(parser)
    parser.add_argument("--output", default="outputs/generate/grid.png", help="the grid; pictures go beside it")
    args = parser.parse_args()
    check_options(parser, args)
    if Path(args.output).suffix != ".png":
        parser.error(f"--output {args.output} must end in .png")
    return args


def settings_of(args: argparse.Namespace) -> RolloutSettings:
    """The checkpoint's settings with the command line's over them."""
    saved = RolloutSettings.load(args.model)
    given = {name: getattr(args, name) for name in SAMPLING_OPTIONS if getattr(args, name) is not None}
    texts = {
        name: getattr(args, name) for name in ("chat_template", "system_prompt") if getattr(args, name) is not None
    }
    if args.reasoning_prompt_path:
        texts["reasoning_prompt"] = Path(args.reasoning_prompt_path).read_text(encoding="utf-8").strip()
    return RolloutSettings(replace(saved.prompts, **texts), replace(saved.sampling, **given))


def main() -> None:
    args = parse_args()
    logging.disable_progress_bar()
    settings = settings_of(args)
    policy = load_policy(args.model, dtype=getattr(torch, args.dtype), device=args.device)
    engine = RolloutEngine(policy, policy.prompt_encoder(settings.prompts))
    grid = Path(args.output)
    grid.parent.mkdir(parents=True, exist_ok=True)
    chunks = engine.generate(args.prompts, args.num_generations, settings.sampling, args.seed)
    rollout = RolloutChunk.cat(list(chunks))

    rows: dict[str, list[Sample]] = {}
    for s, (plan, pixels) in enumerate(zip(rollout.plan_texts, to_pixels(rollout.images), strict=True)):
        prompt = args.prompts[s // args.num_generations]
        rows.setdefault(prompt, []).append(Sample("", "", plan, math.nan, {}, pixels))
        matplotlib.image.imsave(grid.with_name(f"{grid.stem}-{s:03d}.png"), pixels)
        print(f"{prompt} -> {plan}")
    draw_grid(rows, grid)
    print(f"wrote {grid} and {len(rollout)} pictures beside it")


def run() -> None:
    """The command line, as `python generate.py` and as `bicot-generate`."""
    with one_line_errors(sys.argv):
        main()


if __name__ == "__main__":
    run()
