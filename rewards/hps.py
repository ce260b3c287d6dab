"""The hps reward is the human preference score v2 or v2.1: the cosine of picture and prompt in a fine-tuned CLIP.

    score = cos(f_image, f_text) = <f_image, f_text> / (|f_image| |f_text|), in float32: 0.2 to 0.35 in practice

The published file holds the weights of an open_clip ViT-H-14. transformers' CLIPModel computes the same: in_proj is q,
k and v stacked, a projection is the transpose of a linear layer's weight, and the GELU is exact.

Shapes: S samples, P prompts, E features (1,024). FLOPs at the published size (224 pixels, 257 tokens; at most 77 text
tokens): 335 G for each image, and 0.6 G for each text token. A prompt is encoded once for all of its pictures.

Pictures are resampled as in HPS v2's own code, on floats, where bicubic may overshoot. HPS v2's code also repairs texts
with ftfy, for example curly quotes. This code does not, since none of T2I-R1's 7,223 prompts needs it.

Source: Wu et al. 2023, "Human Preference Score v2" (arXiv 2306.09341); HPS_v2.1_compressed.pt of xswu/HPSv2 on the hub.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.utils import cached_file

from ..kernels.host import upload
from .base import Example
from .checkpoints import check_kind, load_complete, loading
from .preprocess import CLIP_MEAN, CLIP_STD, Preprocess

PUBLISHED, FILE = "xswu/HPSv2", "HPS_v2.1_compressed.pt"
TOKENIZER = "openai/clip-vit-large-patch14"
VISION_HEAD, TEXT_HEAD = 80, 64  # widths of an attention head in a ViT-H-14, which the shapes of weights do not tell
RENAMED = [
    (r"^visual\.transformer\.resblocks", "vision_model.encoder.layers"),
    (r"^visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"^visual\.conv1", "vision_model.embeddings.patch_embedding"),
    (r"^visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre", "vision_model.pre_layrnorm"),
    (r"^visual\.ln_post", "vision_model.post_layernorm"),
    (r"^visual\.proj", "visual_projection.weight"),
    (r"^transformer\.resblocks", "text_model.encoder.layers"),
    (r"^token_embedding", "text_model.embeddings.token_embedding"),
    (r"^positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final", "text_model.final_layer_norm"),
    (r"^text_projection", "text_projection.weight"),
    (r"\.attn\.", ".self_attn."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
]


class HPSReward:
    """Cosine of a picture and its prompt, in [-1, 1].

    Args:
        model: frozen.
        tokenizer: CLIP's.

    Raises:
        ValueError: the tokenizer has another vocabulary than the model.
    """

    name = "hps"

    def __init__(self, model: CLIPModel, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        config: Any = model.config
        words, self.context = config.text_config.vocab_size, config.text_config.max_position_embeddings
        if tokenizer.eos_token_id != words - 1:
            raise ValueError(
                f"reward 'hps': the tokenizer does not fit the model, whose last of {words} tokens ends a text; "
                f"the tokenizer's end of text is {tokenizer.eos_token_id}"
            )
        self.preprocess = Preprocess(config.vision_config.image_size, CLIP_MEAN, CLIP_STD, clip=False)
        self._known: dict[str, Tensor] = {}  # text features of the last call, since the next one often has its prompts

    @classmethod
    def from_pretrained(
        cls, path: str | Path = PUBLISHED, *, dtype: str | torch.dtype = "float32", tokenizer: str | Path = TOKENIZER
    ) -> HPSReward:
        """Load the reward.

        Args:
            path: a published .pt file, or its folder or hub id; or a folder that `save_pretrained` wrote.
            dtype: of the model; the cosine is float32.
            tokenizer: folder or hub id of CLIP's tokenizer.json, for a .pt file. Folders of `save_pretrained` have one.

        Raises:
            MissingCheckpoint: there are no weights at `path`, or no tokenizer.json at `tokenizer`.
            ValueError: another architecture, a file that torch did not write, or another vocabulary.
        """
        precision = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if not isinstance(precision, torch.dtype) or not precision.is_floating_point:
            raise ValueError(f"reward 'hps' cannot compute in {dtype!r}")
        with loading(cls.name, path, f"hf download {PUBLISHED} {FILE}"):
            converted = (Path(path) / "config.json").is_file()
            if converted:
                check_kind(path, "clip")
                model = load_complete(CLIPModel, path, dtype=precision)
            else:
                model = _load_published(path, precision)
        option, place = ("path", path) if converted else ("tokenizer", tokenizer)
        with loading(cls.name, place, f"hf download {TOKENIZER} tokenizer.json", option):
            # without the file, from_pretrained would make up a vocabulary of two words
            folder = Path(str(cached_file(place, "tokenizer.json"))).parent
            return cls(model, CLIPTokenizer.from_pretrained(folder))

    def applies(self, example: Example) -> bool:
        """True for all prompts. So a score of NaN is an error."""
        return True

    @torch.no_grad()
    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """[S, 3, H, W] in [0, 1], S examples -> [S] float32."""
        texts = self._texts([example.prompt for example in examples], images.device)
        pictures = self.model.visual_projection(self.model.vision_model(self.preprocess(images)).pooler_output)
        return (F.normalize(pictures.float(), dim=-1) * texts).sum(-1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model and tokenizer in transformers' format. It loads faster, and is smaller if the dtype is."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _texts(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        """Normalised features [S, E] float32 of S prompts; equal prompts are computed once."""
        distinct = list(dict.fromkeys(prompts))
        known = {prompt: self._known[prompt].to(device) for prompt in distinct if prompt in self._known}
        if new := [prompt for prompt in distinct if prompt not in known]:
            ids = self.tokenizer(new, truncation=True, max_length=self.context, padding=True).input_ids
            # no mask for padding: attention is causal, and the features are those of the end of the text
            texts = self.model.text_projection(self.model.text_model(upload(ids, device)).pooler_output)
            known |= zip(new, F.normalize(texts.float(), dim=-1), strict=True)
        self._known = known
        return torch.stack([known[prompt] for prompt in distinct])[upload([distinct.index(p) for p in prompts], device)]


def clip_from_open_clip(weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> CLIPModel:
    """Convert the state dict of an open_clip ViT-H-14 to a CLIPModel, whose weights are copies in `dtype`.

    Raises:
        ValueError: they are the weights of another model.
    """
    renamed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        if ".in_proj_" in name:
            for which, third in zip("qkv", weight.chunk(3), strict=True):
                renamed[name.replace(".in_proj_", f".{which}_proj.")] = third
        else:
            renamed[name] = weight.T if name in ("visual_projection.weight", "text_projection.weight") else weight
    with torch.device("meta"):
        model = CLIPModel(_config(weights))
    expected, given = ({name: w.shape for name, w in named.items()} for named in (model.state_dict(), renamed))
    if wrong := sorted(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name)):
        raise ValueError(f"these are not the weights of an open_clip ViT-H-14: they differ in {wrong[:3]}")
    owned = {k: w.to(dtype, copy=True, memory_format=torch.contiguous_format) for k, w in renamed.items()}
    model.load_state_dict(owned, assign=True, strict=True)
    for embeddings in (model.text_model.embeddings, model.vision_model.embeddings):  # no state dict holds these
        embeddings.position_ids = torch.arange(embeddings.position_embedding.num_embeddings)[None]
    return model.eval().requires_grad_(False)


def _config(weights: Mapping[str, Tensor]) -> CLIPConfig:
    """The configuration that the shapes of the weights imply."""

    def tower(prefix: str, head: int) -> dict[str, Any]:
        blocks = f"{prefix}transformer.resblocks."
        inner, width = weights[f"{blocks}0.mlp.c_fc.weight"].shape
        if width % head:
            raise ValueError(f"these are not the weights of an open_clip ViT-H-14: {width} is no multiple of {head}")
        return dict(
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=sum(name.startswith(blocks) and name.endswith(".ln_1.weight") for name in weights),
            num_attention_heads=width // head,
            hidden_act="gelu",
            projection_dim=weights["text_projection"].shape[1],
        )

    try:
        vocabulary, patch = len(weights["token_embedding.weight"]), weights["visual.conv1.weight"].shape[-1]
        text, vision = tower("", TEXT_HEAD), tower("visual.", VISION_HEAD)
        text |= dict(vocab_size=vocabulary, max_position_embeddings=len(weights["positional_embedding"]))
        text |= dict(bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1)
        vision |= dict(patch_size=patch, image_size=patch * math.isqrt(len(weights["visual.positional_embedding"])))
    except KeyError as error:
        raise ValueError(f"these are not the weights of an open_clip ViT-H-14: there is no {error}") from error
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=text["projection_dim"])


def _load_published(path: str | Path, dtype: torch.dtype) -> CLIPModel:
    file = str(path if Path(path).is_file() else cached_file(path, FILE))
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{file!r} is not a complete file of torch weights: {error}") from error
    weights = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict):
        raise ValueError(f"{file!r} has no 'state_dict'")
    return clip_from_open_clip(weights, dtype)
