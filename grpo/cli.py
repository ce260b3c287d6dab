"""Reads the settings from YAML files and from the options of the command line, which override them."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from .config import Config
from .errors import one_line, with_nearest
from .files import ROOT

_PATHS = ("model_name_or_path", "train_file", "eval_file", "reasoning_prompt_path", "deepspeed")


class Parser(ArgumentParser):
    """An argument parser whose errors are one line, with what a value may be or the nearest name of a setting."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = one_line(message)
        message = re.sub(r"^Parser key \"([\w.]+)\":", r"\1:", message)
        message = re.sub(r"typing\.|<class '(\w+)'>", r"\1", message).replace("Expected a ", "expected ")
        union = r"Does not validate against any of the Union subtypes Subtypes: \[(.*)\] Errors: .* Given value: "
        message = re.sub(union, r"expected one of \1. Got value: ", message)
        self.exit(2, f"error: {with_nearest(message, self._option_string_actions)} (--help explains every setting)\n")


def build_parser(description: str, defaults: Sequence[str] = ()) -> ArgumentParser:
    """The parser of train.py, with every field of Config as an option.

    Args:
        description: what `--help` says of the program.
        defaults: configuration files whose values `--help` shows as the defaults.
    """
    parser = Parser(
        allow_abbrev=False,
        description=description,
        usage="%(prog)s [--config FILE] [--SETTING VALUE ...] [--help]",
        default_config_files=list(defaults),
    )
    text = "YAML file with settings; options override it, and a later file overrides an earlier one"
    parser.add_argument("--config", action=ActionConfigFile, help=text)
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    parser.add_argument("--dry_run", action="store_true", help="print the memory plan and end; needs no GPU")
    parser.add_argument("--gpus", type=int, default=1, help="with --dry_run: number of GPUs of the run")
    parser.add_argument("--gpu_gib", type=float, default=80.0, help="with --dry_run: memory of one GPU in GiB")
    parser.add_argument("--force_memory", action="store_true", help="run even if the memory plan does not fit the GPU")
    parser.add_argument(
        "--view",
        type=int,
        nargs="?",
        const=0,
        metavar="PORT",
        help="show curves and samples live in a browser, at this port or any free one",
    )
    parser.add_class_arguments(Config)
    return parser


def parse_config(argv: Sequence[str]) -> Config:
    """The Config that `parse` returns."""
    return parse(argv)[0]


def parse(argv: Sequence[str]) -> tuple[Config, Any]:
    """Parse a command line -> the Config, and a namespace with the options that are no settings.

    Options override the files of `--config`, wherever they stand. Without `--config`, the toy's file is read. Paths are
    relative to the working directory. A path that does not exist there is looked up in bicot's own folder, so that the
    toy's settings work from any directory.

    Raises:
        SystemExit: a setting is unknown (the message names the nearest one), or a value has the wrong type or range.
    """
    files, words = [], []
    rest = iter(argv)
    for word in rest:
        if word == "--config" or word.startswith("--config="):
            files.append(next(rest, "") if word == "--config" else word.removeprefix("--config="))
        else:
            words.append(word)
    files = files or [str(ROOT / "configs" / "toy.yaml")]
    words = [*(f"--config={file}" for file in files), *words]  # first, because jsonargparse lets later words win
    parser = build_parser("Train a Janus model with BiCoT-GRPO.")
    for file in files:
        if problem := _problem_of(file):
            parser.error(f"--config {file}: {problem}" if file else "--config needs a file")
    if {"-h", "--help"} & set(words):  # show the values of the files as the defaults
        parser = build_parser("Train a Janus model with BiCoT-GRPO.", files)
    for word in words:
        if single := re.match(r"--rewards\.options\.([^.=]+)\.", word):  # jsonargparse would drop the other options
            parser.error(
                f"{word}: give all options of one reward, as --rewards.options.{single[1]} '{{path: …, dtype: …}}'"
            )
    namespace = parser.parse_args(words)
    try:
        parsed = parser.instantiate(namespace)
        values = {item.name: parsed[item.name] for item in dataclasses.fields(Config)}
        for name in _PATHS:
            if values[name] is not None and not Path(values[name]).exists() and (ROOT / values[name]).exists():
                values[name] = str(ROOT / values[name])
        return Config(**values), namespace
    except ValueError as error:
        parser.error(str(error), error)


def _problem_of(file: str) -> str | None:
    """Why a configuration file cannot be read, in one line; None if it can. For a missing file, name the nearest."""
    if file and not Path(file).is_file():
        ours = {path.stem: path for path in (ROOT / "configs").glob("*.yaml")}
        near = difflib.get_close_matches(Path(file).stem.lower().replace("_", "-"), ours, n=1)
        what = "a folder, not a file" if Path(file).is_dir() else "no such file"
        path = ours[near[0]] if near else None
        shown = os.path.relpath(path) if path and path.is_relative_to(Path.cwd()) else path
        return what + (f"; did you mean {shown}?" if shown else "")
    try:
        settings = yaml.safe_load(Path(file).read_text(encoding="utf-8")) if file else None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return f"not YAML: {' '.join(str(error).split())}"
    if settings is None:
        return "the file is empty"
    if isinstance(settings, dict) and "zero_optimization" in settings:
        return "a configuration of DeepSpeed; give it with --deepspeed"
    return None if isinstance(settings, dict) else "no settings, which are lines `name: value`"
