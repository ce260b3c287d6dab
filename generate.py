"""Plans and draws pictures of prompts with any checkpoint: `python generate.py`, or `bicot-generate`.

    python generate.py "a red circle left of a blue square"                              # the toy
    python generate.py "a red circle" --model outputs/toy/checkpoint-000150              # what you trained
    python generate.py "a photo of a cat" --model deepseek-community/Janus-Pro-1B --dtype bfloat16
    python generate.py --prompt_file prompts.txt --num_generations 1 --json             # or .jsonl; - is stdin
    python generate.py "a red circle" --plan "red circle at top ."                       # your plan; off = none
    python generate.py --prompt_file rows.jsonl --best_of 16 --rewards.names scene       # the best of 16 by the rewards

Each picture is written as soon as it is drawn. Its PNG text chunks hold the prompt, plan, seed and settings. At the end
a grid of the first pictures is written. Chat prompts and sampling settings come from the checkpoint's bicot.json, or
else are the published ones; options override them. A picture depends on its own seed alone, so that
`--seed 7 --num_generations 1` draws the picture of seed 7 again.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm
from transformers.utils import logging

import bicot
from bicot.grpo.best_of import Ranked, best_of, require_scores
from bicot.grpo.cli import parse_config
from bicot.grpo.data import bare, read_prompts
from bicot.grpo.errors import Parser, one_line_errors
from bicot.grpo.evaluate import Sample
from bicot.grpo.files import whole
from bicot.grpo.output import require_writable
from bicot.grpo.report import draw_grid
from bicot.model.adapters import adapter_base
from bicot.model.generation import Generation, Policy
from bicot.model.policy import read_config
from bicot.model.prompts import read_reasoning_prompt
from bicot.model.settings import RolloutSettings, Sampling
from bicot.rewards.base import Example
from bicot.rewards.ensemble import RewardEnsemble

TOY = Path(__file__).resolve().parent / "toy" / "assets"
GRID = 64  # maximum number of pictures in the grid
REWARDS = ("config", "rewards.names", "rewards.options", "reward_weights")  # the same options as in train.py
SAMPLING_OPTIONS = {
    "cfg_weight": (float, "weight of classifier-free guidance for the picture; 1 = no guidance"),
    "temperature": (float, "sampling temperature of the plan; 0 = greedy"),
    "top_k": (int, "sample each token of the plan from this many most probable ones; 0 = from all"),
    "image_temperature": (float, "sampling temperature of the picture; 0 = greedy"),
    "max_completion_length": (int, "maximum number of tokens in a plan"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that generate.py and evaluate.py share: which checkpoint draws, and how."""
    add, saved = parser.add_argument, "(default: the checkpoint's)"
    add("--model", default=str(TOY), help="checkpoint or adapter folder, or hub id (default: the toy)")
    for name, (kind, text) in SAMPLING_OPTIONS.items():
        add(f"--{name}", type=kind, help=f"{text} {saved}")
    add("--chat_template", choices=["t2i_r1", "janus"], help=f"role names in the prompts {saved}")
    add("--system_prompt", help=f"first line of the planning prompt {saved}")
    add("--reasoning_prompt_path", help=f"file with the planning instruction {saved}")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="data type of the weights")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    add("--seed", type=int, default=0, help="random seed; generate.py: of the first picture, the others count up")
    add("--debug", action="store_true", help="show where an error came from")


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program if --num_generations or an option of `add_options` has a value that it may not have."""
    if args.num_generations is not None and args.num_generations < 1:
        parser.error(f"--num_generations {args.num_generations} must be at least 1")
    try:
        gpu = torch.device(args.device).type == "cuda"
    except RuntimeError:
        parser.error(f"--device {args.device} is no device; give cpu, cuda, or cuda:1 for the second GPU")
    if gpu and (torch.device(args.device).index or 0) >= torch.cuda.device_count():
        parser.error(f"--device {args.device}: torch sees {torch.cuda.device_count()} GPUs here; leave --device out")
    try:
        Sampling(**sampling_of(args))
    except ValueError as error:
        parser.error(f"--{error}")


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling settings that the command line gives."""
    return {name: value for name in SAMPLING_OPTIONS if (value := getattr(args, name)) is not None}


def parse_args(words: list[str]) -> argparse.Namespace:
    parser = Parser(description="Plan and draw pictures from prompts.", allow_abbrev=False)
    add = parser.add_argument
    add("prompts", nargs="*", help="prompts; - = read them from standard input, one on each line")
    add("--prompt_file", help="file with a prompt on each line, as text or as JSON; - = standard input")
    add("--num_generations", type=int, help="pictures to keep of each prompt (default: 4; with --best_of 1)")
    add("--plan", default="auto", help="auto = the model plans; off = no plan; any other text = the plan")
    add_options(parser)
    text = "PNG file of the grid; pictures go beside it, and replace older ones"
    add("--output", default="outputs/generate/grid.png", help=text)
    add("--json", action="store_true", help="print a line of JSON for each picture to stdout, and nothing else")
    add("--best_of", type=int, metavar="N", help="draw N pictures of each prompt and keep the best")
    add("--config", help="with --best_of: take the rewards of this YAML file of train.py")
    add("--rewards.names", help="with --best_of: names of the rewards, as for train.py")
    add("--rewards.options", help="with --best_of: options of the rewards, as for train.py")
    add("--reward_weights", help="with --best_of: one weight for each reward (default: 1)")
    args = parser.parse_args(words)
    check_options(parser, args)
    given = [f"--{name}" for name in REWARDS if getattr(args, name) is not None]
    if args.best_of is None and given:
        parser.error(f"{given[0]} needs --best_of N")
    if args.best_of is not None and args.best_of < (args.num_generations or 1):
        parser.error(f"--best_of {args.best_of} must be at least the number of pictures to keep")
    if args.best_of is not None and not {"--config", "--rewards.names"} & set(given):
        parser.error("--best_of needs rewards: give --rewards.names, or the --config of a run")
    if Path(args.output).suffix != ".png":
        parser.error(f"--output {args.output} must end in .png")
    if not args.prompts and args.prompt_file is None:
        parser.error("give a prompt, or a --prompt_file")
    return args


def settings_of(args: argparse.Namespace) -> RolloutSettings:
    """The checkpoint's settings, overridden by the options of the command line."""
    base = adapter_base(args.model)
    read_config(base or args.model)  # before bicot.json: raises at once if there is no such model
    saved = RolloutSettings.load(args.model, *([base] if base else []))
    texts = {
        name: getattr(args, name) for name in ("chat_template", "system_prompt") if getattr(args, name) is not None
    }
    if args.reasoning_prompt_path:
        texts["reasoning_prompt"] = read_reasoning_prompt(args.reasoning_prompt_path)
    return RolloutSettings(replace(saved.prompts, **texts), replace(saved.sampling, **sampling_of(args)))


def rewards_of(args: argparse.Namespace) -> RewardEnsemble:
    """The rewards of --best_of, built as train.py builds them, without those that a run only monitors."""
    words = [f"--{name}={value}" for name in REWARDS if (value := getattr(args, name)) is not None]
    config = parse_config(words)
    rewards = replace(config.rewards, monitor=[], heldout=[])
    return rewards.build(config.reward_weights, device=args.device)  # type: ignore[arg-type]


def draw(args: argparse.Namespace, examples: list[Example], settings: RolloutSettings) -> Iterator[list[Ranked]]:
    """Draw and yield groups: one picture at a time, or with --best_of all pictures of a prompt, best first."""
    ensemble = rewards_of(args) if args.best_of else None
    if ensemble:
        require_scores(ensemble, examples)
    policy = Policy.from_pretrained(args.model, dtype=getattr(torch, args.dtype), device=args.device)
    policy.settings = settings
    if ensemble:
        yield from best_of(policy, ensemble, examples, args.best_of, args.seed, args.plan, settings.sampling)
        return
    prompts = [example.prompt for example in examples]
    for picture in policy.stream(prompts, args.num_generations or 4, args.seed, args.plan, settings.sampling):
        yield [Ranked(picture, math.nan, {})]


def save(picture: Generation, path: Path, checkpoint: str, settings: RolloutSettings) -> None:
    """Write a picture as a PNG whose text chunks say how to draw it again."""
    info = PngInfo()
    cfg_weight = settings.sampling.cfg_weight
    texts = {"prompt": picture.prompt, "plan": picture.plan, "seed": picture.seed, "checkpoint": checkpoint}
    texts |= {"cfg_weight": cfg_weight, "settings": json.dumps(asdict(settings)), "bicot": bicot.__version__}
    for name, text in texts.items():
        info.add_text(name, str(text))
    with whole(path) as part:
        picture.image.save(part, pnginfo=info)


def row_of(one: Ranked, group: list[Ranked], path: Path) -> dict[str, Any]:
    """The object that --json prints for a picture. A score is null where the reward does not apply."""
    row = {"prompt": one.picture.prompt, "plan": one.picture.plan, "seed": one.picture.seed, "file": str(path)}
    if one.scores:
        by_seed = sorted(group, key=lambda other: other.picture.seed)
        row |= {"score": _number(one.score), "scores": {name: _number(score) for name, score in one.scores.items()}}
        row |= {"scores_of_all": [_number(other.score) for other in by_seed]}
    return row


def line_of(row: dict[str, Any]) -> str:
    """The same as a line for people to read."""
    numbers = [f"{row['seed']:>8}"]
    if "score" in row:
        scored = [score for score in row["scores_of_all"] if score is not None]
        scores = (row["score"], statistics.fmean(scored), *row["scores"].values())
        numbers += [f"{'–':>8}" if score is None else f"{score:8.3f}" for score in scores]
    text = " ".join(f"{row['prompt']} -> {row['plan']}".split())
    return "  ".join([*numbers, Path(row["file"]).name, text])


def _number(score: float) -> float | None:
    return None if math.isnan(score) else score


def write_grid(samples: list[Sample], path: Path) -> None:
    """Write the grid: each prompt above its pictures, or below its picture if no prompt has two pictures."""
    rows: dict[str, list[Sample]] = {}
    for sample in samples:
        rows.setdefault(sample.prompt, []).append(replace(sample, prompt=""))
    draw_grid({"": samples} if len(rows) == len(samples) else rows, path)


def main(words: list[str]) -> None:
    args = parse_args(words)
    logging.disable_progress_bar()
    files = [*["-"] * ("-" in args.prompts), *([] if args.prompt_file is None else [args.prompt_file])]
    examples = [bare(prompt) for prompt in args.prompts if prompt != "-"]
    examples += [example for file in files for example in read_prompts(file)]
    out = sys.stdout
    with redirect_stdout(sys.stderr) if args.json else nullcontext():  # libraries may print too
        write_pictures(args, examples, out)


def write_pictures(args: argparse.Namespace, examples: list[Example], out: TextIO) -> None:
    """Draw and save the pictures and the grid. Print a line for each picture to `out`."""
    settings, grid = settings_of(args), Path(args.output)
    require_writable(grid.parent, "--output")
    shown: list[Sample] = []
    count = 0
    with tqdm(total=len(examples) * (args.best_of or args.num_generations or 4), unit="picture", disable=None) as bar:
        for group in draw(args, examples, settings):
            for one in group[: args.num_generations or 1]:
                path = grid.with_name(f"{grid.stem}-{count:03d}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                save(one.picture, path, args.model, settings)
                row = row_of(one, group, path)
                if one.scores and not count and not args.json:
                    tqdm.write("  ".join(f"{name:>8}" for name in ("seed", "score", "mean", *one.scores)), out)
                tqdm.write(json.dumps(row) if args.json else line_of(row), out)
                out.flush()
                if count < GRID:
                    pixels = np.asarray(one.picture.image)
                    shown.append(Sample(one.picture.prompt, "", one.picture.plan, one.score, {}, pixels))
                count += 1
            bar.update(len(group))
    write_grid(shown, grid)
    first = f" (the first {GRID})" if count > GRID else ""
    print(f"wrote {count} pictures, and {grid}{first} beside them")


def run() -> None:
    """The command line, as `python generate.py` and as `bicot-generate`."""
    with one_line_errors(sys.argv):
        main(sys.argv[1:])


if __name__ == "__main__":
    run()
