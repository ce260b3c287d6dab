"""The grounding reward: an open-vocabulary detector looks for the prompt's objects, and `layout` scores what it finds.

GroundingDINO reads the picture together with the caption "dog . stop sign . tv." and returns Q boxes, each with a logit
for every token of the caption. The score of a phrase is the mean over its tokens,

    scores[p, q] = sum_t map[p, t] sigmoid(logits[q, t]),   map[p, t] = 1 / n_p on the n_p tokens of phrase p, else 0.

Shapes: S samples, P phrases of a sample, Q queries (900), L tokens. At the published size (Swin-T, 800x800 pixels) a
picture costs 506 GFLOP (encoder 340, Swin 118) and 0.35 GB of activations in float32; the text is 1 % of the FLOPs, so
it is encoded for every sample.
Source: T2I-R1 (arXiv 2505.00703) with GroundingDINO (arXiv 2303.05499); its groundingdino_swint_ogc weights are
IDEA-Research/grounding-dino-tiny on the hub.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, GroundingDinoForObjectDetection
from transformers.models.grounding_dino import modeling_grounding_dino as modeling
from transformers.utils import cached_file

from ..kernels.host import upload
from .base import Example
from .checkpoints import check_kind, load_complete, loading
from .layout import THRESHOLD, check_localities, detections, fold, layout_score, phrases
from .preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess

PUBLISHED = "IDEA-Research/grounding-dino-tiny"
DELIMITERS = {"[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029}  # ids at which the model cuts a caption into phrases


class GroundingReward:
    """Scores the objects, counts and relations of a prompt in [0, 1]; `layout` has the formulas.

    Args:
        model: frozen, in float32.
        tokenizer: BERT's, uncased.
        preprocess: prepares the pictures.
        dtype: of the matrix products (autocast): float32, bfloat16 or float16. Box coordinates are always float32.
        threshold: a phrase is found if its score is above this.
        t2i_r1_compat: score as T2I-R1's published code does, with its defects.

    Raises:
        ValueError: another dtype.
    """

    name = "grounding"

    def __init__(
        self,
        model: GroundingDinoForObjectDetection,
        tokenizer: Any,
        preprocess: Preprocess,
        *,
        dtype: str | torch.dtype = "float32",
        threshold: float = THRESHOLD,
        t2i_r1_compat: bool = False,
    ) -> None:
        precision = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if precision not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"reward 'grounding' computes in float32, bfloat16 or float16, not in {dtype!r}")
        self.model, self.tokenizer, self.preprocess = model, tokenizer, preprocess
        self.dtype, self.threshold, self.compat = precision, threshold, t2i_r1_compat
        model.model.text_backbone.register_forward_pre_hook(_place_words, with_kwargs=True)
        model.model.encoder.register_forward_pre_hook(_place_tokens, with_kwargs=True)
        for module in model.modules():
            if isinstance(module, modeling.GroundingDinoMultiscaleDeformableAttention):
                module.attn = DeformableAttention()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path = PUBLISHED,
        *,
        dtype: str | torch.dtype = "float32",
        threshold: float = THRESHOLD,
        t2i_r1_compat: bool = False,
    ) -> GroundingReward:
        """Load the reward.

        Args:
            path: folder or hub id in transformers' format.
            dtype, threshold, t2i_r1_compat: see the class.

        Raises:
            MissingCheckpoint: there are no weights at `path`, or no tokenizer.json.
            ValueError: another architecture, vocabulary or dtype.
        """
        with loading(cls.name, path, f"hf download {PUBLISHED}"):
            check_kind(path, "grounding-dino")
            cached_file(path, "tokenizer.json")  # without the file AutoTokenizer invents a vocabulary
            tokenizer = AutoTokenizer.from_pretrained(path)
            if tokenizer.convert_tokens_to_ids(list(DELIMITERS)) != list(DELIMITERS.values()):
                raise ValueError(f"{str(path)!r} does not have the vocabulary of an uncased BERT: {DELIMITERS}")
            model = load_complete(GroundingDinoForObjectDetection, path, dtype=torch.float32)
            preprocess = _preprocess(path)
        return cls(model, tokenizer, preprocess, dtype=dtype, threshold=threshold, t2i_r1_compat=t2i_r1_compat)

    def applies(self, example: Example) -> bool:
        """Whether the prompt has phrases to look for."""
        return self.compat or bool(phrases(example))

    def check(self, example: Example) -> None:
        """Raises ValueError for the same reasons as `score`."""
        if not self.compat:
            check_localities([example])
        if names := phrases(example, self.compat):
            self._encode([names])

    @torch.no_grad()
    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """images [S, 3, H, W] float32 in [0, 1] on the model's device, S examples -> [S] float32.

        NaN where there is nothing to look for, or where the model's output is not finite.

        Raises:
            ValueError: an unknown locality, a caption that is too long, or a noun without a token.
        """
        if not self.compat:
            check_localities(examples)
        names = [phrases(example, self.compat) for example in examples]
        asked = [s for s, own in enumerate(names) if own]
        pictures = images if len(asked) == len(names) else images[asked]
        found: list[dict[str, Tensor] | None] = [{} for _ in names]
        for s, (boxes, scores) in zip(asked, self.detect(pictures, [names[s] for s in asked]), strict=True):
            # without this test, a failure of the model would look like an empty picture
            sound = boxes.isfinite().all() and scores.isfinite().all()
            found[s] = detections(names[s], boxes, scores, self.threshold, self.compat) if sound else None
        scored = [
            math.nan if seen is None else layout_score(seen, example, self.compat)
            for seen, example in zip(found, examples, strict=True)
        ]
        return upload(scored, images.device)

    def detect(self, images: Tensor, captions: Sequence[Sequence[str]]) -> list[tuple[Tensor, Tensor]]:
        """Score every box for every phrase, without a threshold.

        Args:
            images: [S, 3, H, W] in [0, 1] on the model's device.
            captions: the phrases of each sample, at least one, in lower case.

        Returns:
            For each sample, on the CPU: boxes [Q, 4] as corners in [0, 1], and scores [P, Q].

        Raises:
            ValueError: a caption that is too long, or a noun without a token.
        """
        if not captions:
            return []
        ids, mask, maps = (upload(values, images.device) for values in self._encode(captions))
        pixels = self.preprocess(images)
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            seen = self.model(pixels, input_ids=ids, attention_mask=mask)
        # at padding the logits are -inf, whose sigmoid is 0
        scores = seen.logits[..., : ids.shape[1]].float().sigmoid() @ maps.mT
        centre, size = seen.pred_boxes.float().split(2, dim=-1)
        # 40 KB a sample, in one copy
        table = torch.cat((centre - size / 2, centre + size / 2, scores), dim=-1).cpu()
        return [(own[:, :4], own[:, 4 : 4 + len(names)].T) for own, names in zip(table, captions, strict=True)]

    def _encode(self, captions: Sequence[Sequence[str]]) -> tuple[list[list[int]], list[list[int]], list]:
        """Token ids [S, L], attention mask [S, L] and phrase maps [S, P, L] as lists, padded on the right."""
        read = [list(names if self.compat else map(unmarked, names)) for names in captions]
        texts = [" . ".join(words) + "." for words in read]
        encoded = self.tokenizer(texts, padding=True, padding_side="right", return_offsets_mapping=True)
        ids, masks, spans = encoded["input_ids"], encoded["attention_mask"], encoded["offset_mapping"]
        most, longest = max(map(len, captions)), self.model.config.max_text_len
        maps = [[[0.0] * len(ids[0]) for _ in range(most)] for _ in captions]
        for text, names, words, mask, offsets, weights in zip(texts, captions, read, masks, spans, maps, strict=True):
            if sum(mask) > longest:
                raise ValueError(f"the nouns make {sum(mask)} tokens, the model reads {longest}: {text!r}")
            begin = 0
            for name, word, weight in zip(names, words, weights, strict=False):
                end = begin + len(word)
                tokens = [t for t, (left, right) in enumerate(offsets) if left < end and right > begin]
                if not tokens:
                    raise ValueError(f"the tokenizer has no token for the noun {name!r} in {text!r}")
                for t in tokens:
                    weight[t] = 1 / len(tokens)
                begin = end + len(" . ")
        return ids, masks, maps


def unmarked(name: str) -> str:
    """A phrase without punctuation: "st. bernard" -> "st bernard", "t.v." -> "tv", "cat?" -> "cat".

    The model would cut a phrase at full stops and question marks, and commas would lower the mean over its tokens.
    """
    initials = re.sub(r"(?<=\b[^\W\d_])\.(?=[^\W\d_]\b)", "", name)
    return fold(re.sub("[.,?]", " ", initials))


class DeformableAttention(modeling.MultiScaleDeformableAttention):
    """Samples each head's values around each query at several resolutions, and sums them with the attention weights.

    It replaces transformers' own, which keeps the samples of all levels until the sum: for a picture of 800x800 pixels
    the whole model then needs 805 MiB instead of 338. Here each level is summed alone, so the order of sums differs.

    Shapes: S pictures, N places of all levels, H heads of E elements, Q queries, P points of each of the levels.
    """

    def forward(
        self, values: Tensor, _shapes: Tensor, sizes: list[tuple[int, int]], _starts: Tensor, places: Tensor,
        weights: Tensor, _step: int,
    ) -> Tensor:  # fmt: skip
        """values [S, N, H, E], places [S, Q, H, levels, P, 2] in [0, 1], weights [S, Q, H, levels, P] -> [S, Q, H·E]"""
        S, _, H, E = values.shape
        grids = (2 * places - 1).transpose(1, 2).flatten(0, 1)  # [S·H, Q, levels, P, 2]
        weights = weights.transpose(1, 2).flatten(0, 1)[:, None]  # [S·H, 1, Q, levels, P]
        levels = values.permute(0, 2, 3, 1).flatten(0, 1).split([height * width for height, width in sizes], dim=-1)
        sums = [
            (F.grid_sample(level.unflatten(-1, size), grids[:, :, i], align_corners=False) * weights[..., i, :]).sum(-1)
            for i, (level, size) in enumerate(zip(levels, sizes, strict=True))
        ]  # each [S·H, E, Q]
        return torch.stack(sums).sum(0).view(S, H * E, -1).mT.contiguous()


# A token's position counts from 0 within its phrase, which includes the full stop, and sines of positions are floats.
# Some releases of transformers compute other ones (5.17 puts every full stop at 0 and rounds the sines), so two hooks
# correct both.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _place_words(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    ids, sees, types, _wrong, *rest = args
    return (ids, sees, types, _positions(sees[:, 0]), *rest), kwargs


def _place_tokens(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    positions = _positions(~kwargs["text_self_attention_masks"])
    return args, kwargs | {"text_position_ids": positions.float()}


def _positions(sees: Tensor) -> Tensor:
    """[S, L, L] bool, which tokens attend to which, all within a phrase -> [S, L] positions in the phrase."""
    return sees.tril(-1).sum(-1)


def _preprocess(path: str | Path) -> Preprocess:
    """The preprocessing of the checkpoint's preprocessor_config.json, with the published values for missing keys."""
    file = cached_file(path, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    settings = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
    size = settings.get("size", {})
    return Preprocess(
        size=size.get("shortest_edge", 800),
        max_size=size.get("longest_edge", 1333),
        mean=tuple(settings.get("image_mean", IMAGENET_MEAN)),
        std=tuple(settings.get("image_std", IMAGENET_STD)),
        resample="bicubic" if settings.get("resample") == 3 else "bilinear",
        fit="keep",
    )
