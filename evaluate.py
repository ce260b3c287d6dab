"""Draws the pictures of a benchmark into the folders that its scorer reads, or scores them with bicot's rewards.

    python evaluate.py --prompts evaluation_metadata.jsonl --format geneval --model MODEL --output DIR
    python evaluate.py --prompts color_val.txt --format t2i_compbench --model MODEL --output DIR
    torchrun --nproc-per-node 8 evaluate.py --prompts dpg_bench/prompts --format dpg --model MODEL --output DIR
    python evaluate.py --prompts heldout.jsonl --format bicot --rewards.names scene --model MODEL --output DIR
    python evaluate.py … --model OTHER --output DIR2 --compare DIR          # compare two models, prompt by prompt

If it is stopped, the same command continues. The pictures depend neither on that nor on the number of ranks.
`grpo/benchmarks.py` lists the formats.
"""

from __future__ import annotations

import hashlib
import math
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import logging

from bicot.generate import add_options, check_options, settings_of
from bicot.grpo.benchmarks import BENCHMARKS, Picture, Prompt, check, draw, fingerprint, missing, prepare, require_room
from bicot.grpo.cli import Parser
from bicot.grpo.distributed import Ranks
from bicot.grpo.errors import one_line_errors
from bicot.grpo.output import locked
from bicot.grpo.scores import Evaluation, as_json, chart, difference_table, save_scores, score, table
from bicot.model.engine import RolloutEngine
from bicot.model.policy import load_policy
from bicot.model.settings import RolloutSettings
from bicot.rewards.config import RewardConfig
from bicot.rewards.ensemble import RewardEnsemble


def parse_args(words: list[str]) -> tuple[Any, RewardConfig]:
    parser = Parser(description="Draw and score the pictures of a benchmark.", allow_abbrev=False)
    add = parser.add_argument
    add("--prompts", nargs="+", required=True, help="prompt files; for wise and dpg also a folder of them")
    add("--format", choices=list(BENCHMARKS), required=True, help="format of the prompts and pictures")
    add("--num_generations", type=int, help="number of pictures for each prompt (default: that of the benchmark)")
    add_options(parser)
    add("--plan", choices=["auto", "off"], default="auto", help="auto = the model plans; off = no plan")
    add("--output", default="outputs/evaluate", help="folder to write the pictures to")
    add("--compare", help="with --format bicot: the output folder of another evaluation, to compare with")
    parser.add_class_arguments(RewardConfig, "rewards")
    args = parser.parse_args(words)
    check_options(parser, args)
    rewards = parser.instantiate(args).rewards
    if args.format != "bicot" and (rewards.all or args.compare):
        parser.error("rewards and --compare are for --format bicot: other prompts have no annotations")
    return args, rewards


def settings_to_keep(
    args: Any, settings: RolloutSettings, prompts: list[Prompt], num_generations: int
) -> dict[str, Any]:
    """Everything that the pictures depend on. The output folder keeps it, so that other pictures are not mixed in."""
    texts = "\0".join(f"{prompt.name}\0{prompt.text}\0{prompt.metadata}" for prompt in prompts)
    return {
        "format": args.format,
        "model": args.model,
        "weights": fingerprint(args.model),
        "prompts": hashlib.sha256(texts.encode()).hexdigest(),
        "num_generations": num_generations,
        "seed": args.seed,
        "dtype": args.dtype,
        "plan": args.plan,
        **asdict(settings.prompts),
        **asdict(settings.sampling),
    }


def evaluate(args: Any, rewards: RewardConfig, ranks: Ranks) -> None:
    """Draw the pictures that are missing, and with --format bicot score all of them."""
    output, benchmark = Path(args.output), BENCHMARKS[args.format]
    number = args.num_generations or benchmark.num_generations
    prompts = benchmark.load([Path(path) for path in args.prompts])
    pictures = benchmark.pictures(prompts, number)
    settings = settings_of(args)
    kept = settings_to_keep(args, settings, prompts, number)
    other = Evaluation.load(Path(args.compare)) if args.compare else None
    if other:
        other.require_prompts([prompt.text for prompt in prompts], Path(args.compare))
    device = ranks.device if args.device == "cuda" else torch.device(args.device)
    ensemble = rewards.build_heldout(rewards.build(device=device, failures=output), device, output)
    check(prompts, lambda prompt: ensemble.check(prompt.example) if prompt.example else None)
    absent = ranks.on_main(lambda: missing(output, pictures, kept))
    if absent:
        policy = load_policy(args.model, dtype=getattr(torch, args.dtype), device=device)
        engine = RolloutEngine(policy, policy.prompt_encoder(settings.prompts))
        require_room(engine, settings.sampling, args.plan == "auto", prompts)
        ranks.on_main(lambda: prepare(output, prompts, pictures, kept))
        mine = share(absent, ranks)
        drawn = draw(engine, settings.sampling, args.seed, prompts, mine, number, output, args.plan == "auto")
        for _ in tqdm(drawn, "pictures", len(mine), disable=not ranks.main):
            pass
        del policy, engine, drawn
    replace(ranks, timeout=math.inf).meet(0)  # a rank may draw much longer than another
    if ranks.main:
        print(f"{output}: {len(pictures)} pictures of {len(prompts)} prompts, {len(absent)} of them drawn now")
    if args.format == "bicot":
        report(ensemble, prompts, pictures, number, args, other, device, ranks)


def share(pictures: list[Picture], ranks: Ranks) -> list[Picture]:
    """This rank's part of the pictures. Prompts are dealt out to the ranks in turn, each with all of its pictures."""
    prompts = dict.fromkeys(picture.prompt for picture in pictures)
    mine = set(list(prompts)[ranks.rank :: ranks.size])
    return [picture for picture in pictures if picture.prompt in mine]


def report(
    ensemble: RewardEnsemble,
    prompts: list[Prompt],
    pictures: list[Picture],
    number: int,
    args: Any,
    other: Evaluation | None,
    device: torch.device,
    ranks: Ranks,
) -> None:
    """Score the pictures, print the means, and write scores.json, samples.jsonl and scores.png."""
    output = Path(args.output)
    samples = score(ensemble, prompts, pictures, output, device, ranks)
    if not ranks.main:
        return
    scored = Evaluation.of(samples, number)
    rows = scored.rows()
    print(table(rows) if rows else "no reward applies to any prompt")
    more: dict[str, Any] = {}
    shown = {str(output): rows}
    if other:
        differences = scored.minus(other)
        print(f"\n{output} minus {args.compare}\n{difference_table(differences)}")
        found = [
            entry | {"excludes_zero": row.excludes_zero}
            for row, entry in zip(differences, as_json(differences), strict=True)
        ]
        more = {"compared_with": args.compare, "differences": found}
        shown = {args.compare: other.rows(), **shown}
    save_scores(output, samples, number, rows, more)
    if rows:
        chart(output / "scores.png", shown)
    print(f"samples.jsonl, scores.json{' and scores.png' if rows else ''} are in {output}")


def main(words: list[str]) -> None:
    logging.disable_progress_bar()
    args, rewards = parse_args(words)
    ranks = Ranks.start()
    try:
        with (
            ranks.naming_the_lost(),
            locked(Path(args.output), "--output") if ranks.main else nullcontext(),
        ):
            evaluate(args, rewards, ranks)
    finally:
        ranks.close()


def run() -> None:
    """The command line, as `python evaluate.py`."""
    with one_line_errors(sys.argv, "; the same command continues"):
        main(sys.argv[1:])


if __name__ == "__main__":
    run()
