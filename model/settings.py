"""`bicot.json` holds a checkpoint's prompt texts and sampling settings; other files hold the same for transformers."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.utils import cached_file

from .prompts import PromptFormat

FILE = "bicot.json"
LEAST = {"max_completion_length": 1, "temperature": 0, "top_k": 0, "image_temperature": 0, "image_top_k": 0}


@dataclass(frozen=True)
class Sampling:
    """How the tokens of both stages are sampled.

    Args:
        max_completion_length: maximum number of tokens in a plan, EOS included; a longer plan is cut off.
        temperature, top_k, top_p: of the plan (temperature 0 = greedy, top_k 0 = all tokens).
        image_temperature, image_top_k, image_top_p: of the picture.
        cfg_weight: weight of classifier-free guidance for the picture; 1 = no guidance and no unconditional sequences.
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
            if isinstance(getattr(Sampling, name), int) and not isinstance(value, int):
                raise ValueError(f"{name} {value} must be a whole number, as an int")
        for name in ("top_p", "image_top_p"):
            if not 0 < (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name} {value} must be above 0, and at most 1")
        if not math.isfinite(self.cfg_weight):
            raise ValueError(f"cfg_weight {self.cfg_weight} must be finite")


@dataclass(frozen=True)
class RolloutSettings:
    """The prompt texts and the sampling of a checkpoint. The defaults are the published ones."""

    prompts: PromptFormat = field(default_factory=PromptFormat)
    sampling: Sampling = field(default_factory=Sampling)

    def save(self, folder: str | Path) -> None:
        (Path(folder) / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, *folders: str | Path) -> RolloutSettings:
        """Read bicot.json of the first of these folders or hub ids that has one; the defaults if none has."""
        for folder in folders:
            try:
                path = cached_file(str(folder), FILE)
            except OSError:  # also if there is no such model at all: loading its weights reports that
                continue
            try:
                values = json.loads(Path(str(path)).read_text(encoding="utf-8"))
                return cls(PromptFormat(**values["prompts"]), Sampling(**values["sampling"]))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path} has no valid settings: {error}; delete it for the defaults") from error
        return cls()


def save_for_transformers(folder: str | Path, config: Any, tokenizer: Any, sampling: Sampling) -> None:
    """Write generation_config.json and processor_config.json: plain transformers then draws the same pictures.

    transformers has one set of sampling parameters, which becomes the picture's. It always computes the unconditional
    sequences, but applies guidance only above a scale of 1. So a scale of 1 is written as the next float64 above 1,
    which rounds to 1 in float32.
    """
    draws: dict[str, Any] = {"do_sample": sampling.image_temperature > 0}
    if draws["do_sample"]:
        draws |= {"temperature": sampling.image_temperature}
        draws |= {"top_k": sampling.image_top_k, "top_p": sampling.image_top_p}
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        generation_kwargs={"boi_token_id": tokenizer.boi_token_id},
        guidance_scale=math.nextafter(1, 2) if sampling.cfg_weight == 1 else sampling.cfg_weight,
        **draws,
    ).save_pretrained(folder)
    side = config.vision_config.image_size
    processor = {
        "processor_class": "JanusProcessor",
        "num_image_tokens": config.vision_config.num_image_tokens,
        "image_processor": {  # what JanusImageProcessor would write, but it needs Pillow
            "image_processor_type": "JanusImageProcessor",
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "size": {"height": side, "width": side},
        },
    }
    (Path(folder) / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
