"""Reads prompts in T2I-R1's JSONL schema, checks each line, and says in which order they are trained on.

A line: {"prompt": str, "task_type": str, "nouns"?: [str], "attr_nouns"?: [str],
         "spatial_info"?: {"obj1": str, "obj2": str, "locality": str},
         "numeracy_info"?: [{"num": int, "obj_name": str}]}

Any other key is the user's own. Rewards find it in `example.metadata[key]`.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..rewards.base import Example, NumeracyInfo, SpatialInfo

_KEYS = ("prompt", "task_type", "nouns", "attr_nouns", "spatial_info", "numeracy_info")
LISTED = 20  # maximum number of lines that are listed when they are left out
T = TypeVar("T")


class PromptFile:
    """The usable lines of a prompt file, as examples with their line numbers.

    Args:
        path: the file.
        skip_bad: leave bad lines out instead of raising an error. `said` lists them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there are bad lines (the message names the first as `file:line: what is wrong`), or no usable ones.
    """

    def __init__(self, path: str | Path, skip_bad: bool = False) -> None:
        if not Path(path).is_file():
            what = "a folder" if Path(path).is_dir() else "not there"
            raise FileNotFoundError(f"{path} is {what}; give a prompt file in T2I-R1's JSONL schema")
        self.path, self.skip_bad = path, skip_bad
        self.bad: dict[int, str] = {}
        # a byte that is not UTF-8 becomes a lone surrogate, so that the error can name its line
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as lines:
            self.rows = self._sift([(number, line) for number, line in enumerate(lines, 1) if line.strip()], parse_line)

    @property
    def examples(self) -> list[Example]:
        return [example for _, example in self.rows]

    def check(self, check: Callable[[Example], None]) -> None:
        """Treat lines for which `check` raises ValueError as bad, too."""

        def checked(example: Example) -> Example:
            check(example)
            return example

        self.rows = self._sift(self.rows, checked)

    def unscored(self, applies: Callable[[Example], bool]) -> list[str]:
        """Text for the user: for how many prompts `applies` is false, which says whether a reward applies.

        Raises:
            ValueError: it is false for all.
        """
        without = [(number, example) for number, example in self.rows if not applies(example)]
        if not without:
            return []
        number, example = without[0]
        which = f"{self.path}: no reward applies to {len(without)} of {len(self.rows)} prompts"
        if len(without) == len(self.rows):
            raise ValueError(f"{which}, so nothing can be trained: give them the annotations that the rewards read")
        return [f"{which}, which train nothing; the first is in line {number}: {example.prompt[:80]!r}"]

    def said(self) -> list[str]:
        """Text for the user: which lines were left out and why, at most LISTED of them."""
        if not self.bad:
            return []
        listed = [f"  {self.path}:{number}: {why}" for number, why in sorted(self.bad.items())]
        more = [f"  … and {len(listed) - LISTED} more"] if len(listed) > LISTED else []
        total = len(self.rows) + len(listed)
        return [f"{self.path}: {len(listed)} of {total} lines are left out:", *listed[:LISTED], *more]

    def _sift(self, rows: list[tuple[int, T]], use: Callable[[T], Example]) -> list[tuple[int, Example]]:
        good: list[tuple[int, Example]] = []
        bad: dict[int, str] = {}
        for number, row in rows:
            try:
                good.append((number, use(row)))
            except ValueError as error:
                bad[number] = str(error)
        if bad and not (self.skip_bad and good):
            number, why = next(iter(bad.items()))
            more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            fix = "fix it, or leave such lines out with --skip_bad_prompts true"
            fix = "no line is left" if self.skip_bad else fix
            raise ValueError(f"{self.path}:{number}: {why}{more}; {fix}")
        if not good:
            raise ValueError(f"{self.path} has no prompts")
        self.bad |= bad
        return good


def read_prompts(path: str) -> list[Example]:
    """Read prompts to draw from a file, or from standard input if `path` is "-".

    A line is the text of a prompt, or a JSON object as in training, which needs no task_type.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no prompt (`file:line: what is wrong`), or there are no prompts.
    """
    name = "standard input" if path == "-" else path
    if path != "-" and not Path(path).is_file():
        raise FileNotFoundError(f"no prompt file at {path}; give lines of text, or of JSON with a prompt each")
    text = (sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()).decode("utf-8-sig", "surrogateescape")
    rows = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not rows:
        raise ValueError(f"{name} has no prompts")
    as_json = path.endswith(".jsonl") or rows[0][1].startswith("{")
    examples = []
    for number, line in rows:
        try:
            examples.append(parse_line(line, task_type="any") if as_json else bare(line))
        except ValueError as error:
            raise ValueError(f"{name}:{number}: {error}") from error
    return examples


def bare(prompt: str) -> Example:
    """A prompt without annotations. Raises ValueError if it was read from bytes that are not UTF-8."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        byte = ord(prompt[error.start]) - 0xDC00
        raise ValueError(f"byte 0x{byte:02x} at character {error.start + 1} is not UTF-8; save it as UTF-8") from error
    return Example(prompt, "any")


def parse_line(line: str, **defaults: Any) -> Example:
    """One line of a prompt file -> Example, with `defaults` for missing keys. Raises ValueError if it is bad."""
    try:
        row = json.loads(bare(line).prompt)
        return parse_example(defaults | row if isinstance(row, dict) else row)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def parse_example(row: Any) -> Example:
    """The decoded JSON of a line -> Example. Raises ValueError that says what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object on each line, got {type(row).__name__}")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"{half!r} is half of a surrogate pair, which is no character") from error
    metadata = {key: value for key, value in row.items() if key not in _KEYS}
    for key, value in metadata.items():
        if near := difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.87):
            raise ValueError(f"unknown key {key!r}; did you mean {near[0]!r}? give a key of your own another name")
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            raise ValueError(f"{key!r:.200} has a number that is not finite, which JSON does not have") from None
    spatial = _typed(row, "spatial_info", dict, None)
    return Example(
        prompt=_text(row, "prompt"),
        task_type=_text(row, "task_type"),
        nouns=_texts(row, "nouns"),
        attr_nouns=_texts(row, "attr_nouns"),
        spatial_info=None
        if spatial is None
        else SpatialInfo(*(_text(spatial, k) for k in ("obj1", "obj2", "locality"))),
        numeracy_info=tuple(_numeracy(item) for item in _typed(row, "numeracy_info", list, [])),
        metadata=metadata,
    )


def _typed(row: dict[str, Any], key: str, kind: type, default: Any) -> Any:
    value = row.get(key)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise ValueError(f"{key} must be a {kind.__name__}, got {value!r:.200}")
    return value


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} must be a non-empty string, got {value!r:.200}")
    return value


def _texts(row: dict[str, Any], key: str) -> tuple[str, ...]:
    values = _typed(row, key, list, [])
    if not all(isinstance(value, str) and value.strip() for value in values):
        raise ValueError(f"{key} must hold non-empty strings, got {values!r:.200}")
    return tuple(values)


def _numeracy(item: Any) -> NumeracyInfo:
    if not isinstance(item, dict):
        raise ValueError(f"numeracy_info must hold objects, got {item!r:.200}")
    num = item.get("num")
    if not isinstance(num, int) or isinstance(num, bool) or num < 0:
        raise ValueError(f"numeracy_info.num must be a whole number, got {num!r:.200}")
    return NumeracyInfo(num, _text(item, "obj_name"))


def step_indices(num_examples: int, batch: int, step: int, seed: int) -> list[int]:
    """Indices of the examples of a step, counted from 0. Each epoch has its own permutation; a step may span epochs.

    The result depends on the arguments only, so a resumed run needs no stored position, and all ranks agree.
    """
    indices: list[int] = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(position, num_examples)
        if not indices or place == 0:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(num_examples, generator=generator).tolist()
        indices.append(order[place])
    return indices
