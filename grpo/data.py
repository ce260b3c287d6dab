"""Prompts in T2I-R1's JSONL schema, checked row by row, and the order they are trained in.

A row: {"prompt": str, "task_type": str, "nouns"?: [str], "attr_nouns"?: [str],
        "spatial_info"?: {"obj1": str, "obj2": str, "locality": str}, "numeracy_info"?: [{"num": int, "obj_name": str}]}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..rewards.base import Example, NumeracyInfo, SpatialInfo

_KEYS = {"prompt", "task_type", "nouns", "attr_nouns", "spatial_info", "numeracy_info"}


def load_examples(path: str | Path) -> list[Example]:
    """Read a prompt file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a bad row, as `file:line: what is wrong`, or a file without rows.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no prompt file at {path}; give one in T2I-R1's JSONL schema with --train_file")
    examples = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                examples.append(parse_example(json.loads(line)))
            except ValueError as error:  # json.JSONDecodeError is one
                raise ValueError(f"{path}:{number}: {error}") from error
    if not examples:
        raise ValueError(f"{path} has no rows")
    return examples


def parse_example(row: Any) -> Example:
    """One decoded row -> Example. Raises ValueError with what is wrong."""
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    unknown = sorted(set(row) - _KEYS)
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}; the schema has {', '.join(sorted(_KEYS))}")
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
    )


def _typed(row: dict[str, Any], key: str, kind: type, default: Any) -> Any:
    value = row.get(key)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise ValueError(f"{key} must be a {kind.__name__}, got {value!r}")
    return value


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} must be a non-empty string, got {value!r}")
    return value


def _texts(row: dict[str, Any], key: str) -> tuple[str, ...]:
    values = _typed(row, key, list, [])
    if not all(isinstance(value, str) and value.strip() for value in values):
        raise ValueError(f"{key} must hold non-empty strings, got {values!r}")
    return tuple(values)


def _numeracy(item: Any) -> NumeracyInfo:
    if not isinstance(item, dict):
        raise ValueError(f"numeracy_info must hold objects, got {item!r}")
    num = item.get("num")
    if not isinstance(num, int) or isinstance(num, bool) or num < 0:
        raise ValueError(f"numeracy_info.num must be a whole number, got {num!r}")
    return NumeracyInfo(num, _text(item, "obj_name"))


def step_indices(num_examples: int, batch: int, step: int, seed: int) -> list[int]:
    """Which examples step `step` (from 0) trains on: a fresh permutation each epoch, epochs joined seamlessly.

    A pure function of its arguments, so a resumed run needs no stored position, and every rank sees the same order.
    """
    indices: list[int] = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(position, num_examples)
        if not indices or place == 0:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(num_examples, generator=generator).tolist()
        indices.append(order[place])
    return indices
