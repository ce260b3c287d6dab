"""The git reward asks GIT about attributes and objects, such as "red apple?", and scores how sure it is of "yes".

    score = mean over the prompt's questions of P(yes) / (P(yes) + P(no)) = mean of sigmoid(l_yes - l_no)

l_yes and l_no are the logits after the last token of a question. The questions are the prompt's attr_nouns, or else its
nouns, each with a question mark. GIT is a prefix language model: its image tokens attend to each other and not to the
text, so they pass the vision tower and the text decoder once. All questions of the picture follow them as one sequence,
in which each question attends to the image, to the shared CLS token and to itself. So every question gets the same
answer as alone. Sequences are padded to the longest. Only the rows of "yes" and "no" of the head's 30,522 are used.

Shapes: A pictures with questions, N image tokens, L text tokens, Q questions, D hidden.

FLOPs per image at the published size (420 pixels, N = 901: ViT-L/14 and 6 decoder layers of D = 768): 624 G for the
vision tower, 92 G for its tokens in the decoder, 0.1 G for each text token.

Source: Wang et al. 2022, "GIT: A Generative Image-to-text Transformer for Vision and Language" (arXiv 2205.14100);
checkpoint microsoft/git-large-vqav2, asked as T2I-R1 does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, GitForCausalLM
from transformers.utils import cached_file

from ..kernels.host import upload
from .base import Example
from .checkpoints import check_kind, load_complete, loading
from .preprocess import CLIP_MEAN, CLIP_STD, Preprocess

PUBLISHED = "microsoft/git-large-vqav2"
SKIPPED = ("spatial", "numeracy")  # tasks that the published code does not ask about
RESAMPLE: dict[int, Any] = {2: "bilinear", 3: "bicubic"}  # PIL's numbers


class GitReward:
    """Mean P(yes) of GIT over questions about the prompt's attributes or objects, in [0, 1].

    Args:
        model: frozen.
        tokenizer: of the model.
        preprocess: prepares the pictures.
        t2i_r1_compat: prompts without questions get the score of the published code (0 for spatial and numeracy, 1 for
            others without nouns) instead of none.

    Raises:
        ValueError: a vocabulary without "yes" and "no".
    """

    name = "git"

    def __init__(
        self, model: GitForCausalLM, tokenizer: Any, preprocess: Preprocess, *, t2i_r1_compat: bool = False
    ) -> None:
        self.model, self.tokenizer, self.preprocess, self.t2i_r1_compat = model, tokenizer, preprocess, t2i_r1_compat
        # transformers would choose the slow attention, because the class does not declare that it supports others
        model.git.image_encoder.config._attn_implementation = "sdpa"
        self.yes, self.no = (self._known(word) for word in ("yes", "no"))

    @classmethod
    def from_pretrained(
        cls, path: str | Path = PUBLISHED, *, dtype: str | torch.dtype = "float32", t2i_r1_compat: bool = False
    ) -> GitReward:
        """Load the reward.

        Args:
            path: folder or hub id in the published format.
            dtype: of the model; the probabilities are float32.
            t2i_r1_compat: see the class.

        Raises:
            MissingCheckpoint: there are no weights at `path`, or no tokenizer.
            ValueError: another architecture, another preprocessing, or a vocabulary without "yes" and "no".
        """
        with loading(cls.name, path, f"hf download {PUBLISHED}"):
            check_kind(path, "git")
            model = load_complete(GitForCausalLM, path, dtype=dtype)
            settings = json.loads(Path(str(cached_file(path, "preprocessor_config.json"))).read_text(encoding="utf-8"))
            tokenizer = AutoTokenizer.from_pretrained(path)
            # without the files, transformers makes a tokenizer of special tokens alone
            if len(tokenizer) <= len(tokenizer.all_special_ids):
                raise FileNotFoundError("it has neither tokenizer.json nor vocab.txt")
        return cls(model, tokenizer, clip_preprocess(settings), t2i_r1_compat=t2i_r1_compat)

    def applies(self, example: Example) -> bool:
        """Whether the prompt has questions."""
        return self.t2i_r1_compat or bool(phrases(example))

    def check(self, example: Example) -> None:
        """Raises ValueError for a phrase that has no tokens, or more than the model reads."""
        most = self.model.config.max_position_embeddings
        for phrase in phrases(example):
            alone, asked = self.tokenizer([phrase, f"{phrase}?"], add_special_tokens=False).input_ids
            if not alone:
                raise ValueError(f"the tokenizer has no token for the noun {phrase!r}")
            if len(asked) >= most:  # one position is CLS
                raise ValueError(f"{phrase[:80]!r} makes {len(asked)} tokens, the model reads {most - 1}")

    @torch.no_grad()
    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """images [S, 3, H, W] in [0, 1] on the model's device, S examples -> [S] float32; NaN without questions."""
        asked = [s for s, example in enumerate(examples) if phrases(example)]
        if len(asked) == len(examples):
            return self._ask(images, examples)
        published = [float(example.task_type not in SKIPPED) for example in examples]
        scores = upload(published if self.t2i_r1_compat else [torch.nan] * len(examples), images.device)
        if asked:
            index = upload(asked, images.device)
            scores[index] = self._ask(images[index], [examples[s] for s in asked])
        return scores

    def _ask(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """Ask the questions of A examples about their pictures [A, 3, H, W] -> scores [A] float32."""
        git, device = self.model.git, images.device
        image_AND = git.visual_projection(git.image_encoder(self.preprocess(images)).last_hidden_state)
        cache = DynamicCache()
        git.encoder(image_AND, past_key_values=cache)

        tokens, last, share = self._questions(examples)
        ids, positions, question = upload(tokens, device)
        # a token attends to the image, to CLS (question 0), and to the earlier tokens of its own question
        own = (question[:, None] == 0) | (question[:, None] == question[:, :, None])
        sees = F.pad(own.tril(), (image_AND.shape[1], 0), value=True)
        mask = image_AND.new_zeros(sees.shape).masked_fill_(~sees, -torch.inf)[:, None]
        text_ALD = git.encoder(git.embeddings(ids, positions), attention_mask=mask, past_key_values=cache)[0]

        answers_AQD = text_ALD.take_along_dim(upload(last, device)[..., None], 1).float()
        weight, bias = (w[self.yes].float() - w[self.no].float() for w in self.model.output.parameters())
        return ((answers_AQD @ weight + bias).sigmoid() * upload(share, device)).sum(1)

    def _questions(
        self, examples: Sequence[Example]
    ) -> tuple[list[list[list[int]]], list[list[int]], list[list[float]]]:
        """Join the questions of each example to one sequence.

        Returns:
            ids, positions and question numbers, [3, A, L]; for each question the index of its last token, [A, Q]; for
            each question its weight in the mean, [A, Q].
        """
        wanted = [phrases(example) for example in examples]
        encoded = iter(self.tokenizer([f"{p}?" for asked in wanted for p in asked], add_special_tokens=False).input_ids)
        ids: list[list[int]] = []
        positions: list[list[int]] = []
        numbers: list[list[int]] = []
        last: list[list[int]] = []
        for asked in wanted:
            questions = [next(encoded) for _ in asked]
            ids.append([self.tokenizer.cls_token_id, *(token for q in questions for token in q)])
            positions.append([0, *(position for q in questions for position in range(1, len(q) + 1))])
            numbers.append([0, *(number for number, q in enumerate(questions, 1) for _ in q)])
            last.append(list(accumulate(map(len, questions))))
        share = [[1 / len(ends)] * len(ends) for ends in last]
        return [_padded(ids), _padded(positions), _padded(numbers)], _padded(last), _padded(share)

    def _known(self, word: str) -> int:
        ids = self.tokenizer.encode(word, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            raise ValueError(
                f"reward 'git': {word!r} must be one known token, but the tokenizer gives {ids}; is it complete?"
            )
        return ids[0]


def phrases(example: Example) -> tuple[str, ...]:
    """What to ask about: the attr_nouns, or else the nouns. For tasks that other rewards judge better, nothing."""
    return () if example.task_type in SKIPPED else example.attr_nouns or example.nouns


def clip_preprocess(settings: dict[str, Any]) -> Preprocess:
    """The preprocessing of a CLIPImageProcessor's preprocessor_config.json. Raises ValueError for any other."""
    edges: set[Any] = set()  # must become one number: for square pictures, height and width mean the shortest edge
    for size in (settings.get("size"), settings.get("crop_size")):
        edges.update((size.values() or [None]) if isinstance(size, dict) else [size])
    plain = all(settings.get(f"do_{what}", True) for what in ("resize", "center_crop", "rescale", "normalize"))
    plain &= math.isclose(settings.get("rescale_factor", 1 / 255), 1 / 255)
    if not plain or len(edges) > 1 or None in edges or settings.get("resample", 3) not in RESAMPLE:
        raise ValueError(f"reward 'git' cannot prepare pictures as this preprocessor_config.json asks: {settings}")
    mean, std = settings.get("image_mean", CLIP_MEAN), settings.get("image_std", CLIP_STD)
    return Preprocess(edges.pop(), tuple(mean), tuple(std), RESAMPLE[settings.get("resample", 3)])


def _padded(lists: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Pad all lists with zeros to the length of the longest."""
    longest = max(map(len, lists))
    return [[*values, *[0] * (longest - len(values))] for values in lists]
