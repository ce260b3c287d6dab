"""The rewards of a run: their configuration, and how they are built from names and options."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base import Example, Reward
from .ensemble import RewardEnsemble, Schedule
from .remote import HttpReward
from .worker import OnError, Placement

BUILTIN = {
    "hps": "bicot.rewards.hps:HPSReward",
    "git": "bicot.rewards.git_vqa:GitReward",
    "grounding": "bicot.rewards.grounding:GroundingReward",
    "orm": "bicot.rewards.orm:OrmReward",
    "plan": "bicot.rewards.plan:PlanReward",
    "scene": "bicot.toy.reward:SceneReward",
    "scene_relation": "bicot.toy.reward:SceneRelation",
}
_PLACEMENT = tuple(item.name for item in fields(Placement))


def _placement(options: dict[str, Any]) -> Placement:
    return Placement(**{key: value for key, value in options.items() if key in _PLACEMENT})


def words_of(value: list[str] | str | None) -> list[str]:
    """Split a string at its commas; leave a list as it is. A key without a value in YAML is None: an empty list."""
    return [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value or []


@dataclass
class RewardConfig:
    """Which rewards score a picture, and how.

    Args:
        names: rewards that train, as a list or a string with commas: hps, git, grounding, orm, plan, scene,
            scene_relation, dotted paths `package.module:Class`, or any names for servers, whose options have a `url`.
        monitor: rewards that are scored and logged in every step, but do not train.
        heldout: rewards that score only the evaluations of eval_file, and so cost training steps nothing.
        options: options of each reward, by its name: device, micro_batch (16 pictures, or auto: as many as fit, up to
            16), offload, and the arguments of its class, such as path and dtype. A server has url, timeout (in seconds)
            and retries.
        schedule: threads = rewards work while the policy decodes, each in a thread and on CUDA streams of its own;
            serial = they work one after another when decoding has ended; auto = threads on a GPU, serial on a CPU.
        on_reward_error: raise = a reward that fails stops the run; skip = the sample that it failed on gets no score
            from it, and is counted.
    """

    names: list[str] | str = field(default_factory=list)
    monitor: list[str] | str = field(default_factory=list)
    heldout: list[str] | str = field(default_factory=list)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    schedule: Schedule = "auto"
    on_reward_error: OnError = "raise"

    def __post_init__(self) -> None:
        self.names, self.monitor, self.heldout = map(words_of, (self.names, self.monitor, self.heldout))
        known = [*self.all, *BUILTIN]  # a file may have options of rewards that this run does not use
        self.options = {name: options or {} for name, options in (self.options or {}).items()}
        for name, options in self.options.items():
            if name not in known and "url" not in options:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0)
                raise ValueError(f"rewards.options has {name!r}, which is no reward; did you mean {near[0]!r}?")
            try:
                _placement(options)
            except ValueError as error:
                raise ValueError(f"rewards.options.{name}: {error}") from None

    @property
    def all(self) -> list[str]:
        """Names of all rewards: those that train, the monitored ones, and those of evaluations."""
        return [*self.names, *self.monitor, *self.heldout]

    def load(self, name: str) -> tuple[Reward, Placement]:
        """Load one of the rewards -> the reward, and where it works."""
        options = self.options.get(name, {})
        own = {key: value for key, value in options.items() if key not in _PLACEMENT}
        return load_reward(name, **own), _placement(options)

    def build(
        self,
        weights: Sequence[float] | None = None,
        *,
        device: str | torch.device = "cpu",
        failures: str | Path | None = None,
    ) -> RewardEnsemble:
        """Load the rewards of training steps. RewardEnsemble explains the arguments, and load_reward the errors."""
        return self._build(self.names, weights, self.monitor, device, failures)

    def build_heldout(self, training: RewardEnsemble, device: torch.device, failures: Path) -> RewardEnsemble:
        """The rewards of evaluations: those of training steps, which are reused, and `heldout`, which are loaded."""
        return training.beside(self._build([], None, self.heldout, device, failures)) if self.heldout else training

    def _build(
        self,
        names: Sequence[str],
        weights: Sequence[float] | None,
        monitor: Sequence[str],
        device: str | torch.device,
        failures: str | Path | None,
    ) -> RewardEnsemble:
        loaded = {name: self.load(name) for name in [*names, *monitor]}
        return RewardEnsemble(
            [loaded[name][0] for name in names],
            weights,
            [loaded[name][0] for name in monitor],
            placements={reward.name: place for reward, place in loaded.values()},
            device=device,
            schedule=self.schedule,
            on_reward_error=self.on_reward_error,
            failures=failures,
        )


@dataclass(frozen=True)
class FunctionReward:
    """Makes a reward of a function `(images, examples) -> [S]`."""

    name: str
    function: Callable[[Tensor, Sequence[Example]], Tensor]

    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """The scores that the function returns."""
        return self.function(images, examples)


def find_object(what: str, path: str) -> Any:
    """Import the object at `package.module:name`, installed or in the working directory.

    Raises:
        ValueError: it cannot be imported; the message calls it `what`.
    """
    module, colon, attribute = path.partition(":")
    if not colon:
        raise ValueError(f"{what} {path!r} must be package.module:name")
    here = os.getcwd()
    if here not in sys.path:  # a script has only its own folder there; append, so that no installed module is hidden
        sys.path.append(here)
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{what} {path!r} cannot be imported: {error} (looked in {here} too)") from error


def load_reward(name: str, **options: Any) -> Reward:
    """Load a reward.

    Args:
        name: a built-in reward; or `package.module:name` of a class, of an object with `name` and `score`, or of a
            scoring function; or, with the option `url`, any name for a server.
        options: arguments of the class (of its `from_pretrained`, if it has one), or of the function.

    Raises:
        ValueError: there is no such reward, it is not a reward, or it does not have one of the options.
        MissingCheckpoint: its weights are not there.
        Unavailable: its server does not answer.
    """
    if "url" in options and ":" not in name:
        _fits(name, HttpReward, [name], options)
        return HttpReward(name, **options)
    path = BUILTIN.get(name, name)
    if ":" not in path:
        near = difflib.get_close_matches(name.lower(), BUILTIN, n=1)
        raise ValueError(
            f"unknown reward {name!r}{f'; did you mean {near[0]!r}?' if near else ''}; built in are "
            f"{', '.join(sorted(BUILTIN))}, your own is package.module:Class, a server needs a url in rewards.options"
        )
    target = find_object("reward", path)
    is_function = inspect.isfunction(target)
    if is_function or inspect.isclass(target):
        make = getattr(target, "from_pretrained", target)
        _fits(name, make, [None, None] * is_function, options)
        target = (
            FunctionReward(path.partition(":")[2], functools.partial(target, **options))
            if is_function
            else make(**options)
        )
    elif options:
        raise ValueError(f"reward {name!r} is an object, which takes no options: {', '.join(options)}")
    if not isinstance(target, Reward):
        raise ValueError(f"reward {name!r} needs a `name` and a `score(images, examples)`; see docs/rewards.md")
    return target


def _fits(name: str, make: Callable[..., Any], first: Sequence[Any], options: dict[str, Any]) -> None:
    """Raises ValueError unless `make(*first, **options)` is a valid call."""
    try:
        inspect.signature(make).bind(*first, **options)
    except TypeError as error:
        raise ValueError(
            f"reward {name!r}: {error}; it takes {inspect.signature(make)}, and each reward {', '.join(_PLACEMENT)}"
        ) from error
