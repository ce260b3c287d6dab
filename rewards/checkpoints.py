"""Loads published checkpoints completely, or raises an error that says what is missing and how to get it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import cached_file


class MissingCheckpoint(FileNotFoundError):
    """A reward's files are not there; the message says how to download them."""


@contextmanager
def loading(reward: str, path: str | Path, download: str, option: str = "path") -> Iterator[None]:
    """Inside, errors about files that are not there become a MissingCheckpoint.

    Args:
        reward: name of the reward.
        path: folder, file or hub id that is being loaded.
        download: command that downloads the published files.
        option: the option of the reward that takes their path.
    """
    try:
        if (Path(path).is_absolute() or str(path).startswith(".")) and not Path(path).exists():
            raise FileNotFoundError("there is no such file or folder")  # transformers would take it for a hub id
        yield
    except OSError as error:
        raise MissingCheckpoint(
            f"reward {reward!r} cannot load {str(path)!r}: {error}\n  get the published files with\n"
            f"    {download}\n  and, if you move them, give their folder or file with rewards.options.{reward}.{option}"
        ) from error


def check_kind(path: str | Path, kind: str) -> None:
    """Raises ValueError unless the checkpoint at `path` is of model_type `kind`; OSError if it has no config.json."""
    found = json.loads(Path(str(cached_file(path, "config.json"))).read_text(encoding="utf-8")).get("model_type")
    if found != kind:
        raise ValueError(f"{str(path)!r} is a checkpoint of {found!r}, not of {kind!r}")


def load_complete(
    cls: Any,
    path: str | Path,
    *,
    dtype: str | torch.dtype,
    strict: bool = False,
    unused: tuple[str, ...] = (),
    **options: Any,
) -> Any:
    """Load a frozen model in eval mode, and check that all weights are there. `from_pretrained` would make them random.

    Args:
        cls: a model class of transformers.
        path: folder or hub id.
        dtype: of the weights.
        strict: whether a superfluous weight is an error too.
        unused: prefixes of names that may be missing or superfluous.
        options: further arguments of `from_pretrained`.

    Raises:
        ValueError: weights are missing or of another shape; it names some.
    """
    model, report = cls.from_pretrained(
        path, dtype=dtype, weights_only=True, ignore_mismatched_sizes=True, output_loading_info=True, **options
    )
    names = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    names |= set(report["unexpected_keys"]) if strict else set()
    if wrong := sorted(name for name in names if not name.startswith(unused)):
        raise ValueError(
            f"{str(path)!r} is not the {cls.__name__} that its config.json says: {len(wrong)} weights are missing"
            f"{', superfluous' * strict} or of another shape, such as {wrong[:3]}"
        )
    return model.eval().requires_grad_(False)
