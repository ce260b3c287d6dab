"""How a checkpoint is meant to be prompted and sampled, kept beside its weights as `bicot.json`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .prompts import PromptFormat

FILE = "bicot.json"
LEAST = {"max_completion_length": 1, "temperature": 0, "top_k": 0, "image_temperature": 0, "image_top_k": 0}


@dataclass(frozen=True)
class Sampling:
    """How both stages draw.

    Args:
        max_completion_length: most tokens of a plan, EOS included; the first ones are kept.
        temperature, top_k, top_p: of the plan (temperature 0 = greedy, top_k 0 = all).
        image_temperature, image_top_k, image_top_p: of the picture.
        cfg_weight: classifier-free guidance w of the picture; 1 = none, and no unconditional rows.
    """

    max_completion_length: int = 1024
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    image_temperature: float = 1.0
    image_top_k: int = 0
    image_top_p: float = 1.0
    cfg_weight: float = 5.0

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            if not least <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} {value} must be a number that is at least {least}")
        for name in ("top_p", "image_top_p"):
            if not 0 < (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name} {value} must be above 0, and at most 1")
        if not math.isfinite(self.cfg_weight):
            raise ValueError(f"cfg_weight {self.cfg_weight} must be finite")


@dataclass(frozen=True)
class RolloutSettings:
    """Prompt texts and sampling of a checkpoint; the published ones by default."""

    prompts: PromptFormat = field(default_factory=PromptFormat)
    sampling: Sampling = field(default_factory=Sampling)

    def save(self, folder: str | Path) -> None:
        (Path(folder) / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, *folders: str | Path) -> RolloutSettings:
        """What `save` wrote into the first of these checkpoints that has it; the defaults if none has (or a hub id)."""
        path = next((path for folder in folders if (path := Path(folder) / FILE).is_file()), None)
        if path is None:
            return cls()
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(PromptFormat(**values["prompts"]), Sampling(**values["sampling"]))
