"""The policy: a Janus model with its tokenizer, its two heads, and what of it trains.

Shapes: S samples, T image tokens a picture, D hidden, V a head's vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, JanusForConditionalGeneration

from .packed import right_pad
from .prompts import PromptEncoder, PromptFormat

# What the published recipe trains is the language model and its head; everything else stays as it came.
PUBLISHED_FREEZE = (
    "model.vision_model",
    "model.aligner",
    "model.vqmodel",
    "model.generation_embeddings",
    "model.generation_aligner",
    "model.generation_head",
)


@dataclass(frozen=True)
class Head:
    """A linear head: logits = features @ weight.T + bias, weight [V, D]."""

    weight: Tensor
    bias: Tensor | None


class Policy:
    """A `JanusForConditionalGeneration` and the few ways this package uses it.

    Args:
        model: the transformers module; its parameters are the policy's, nothing is copied.
        tokenizer: its tokenizer, with `boi_token` among its special tokens.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:  # transformers annotates both too loosely to check against
        self.model = model
        self.tokenizer = tokenizer
        self.config = self.model.config
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "boi_token_id"):
            if getattr(tokenizer, name, None) is None:
                raise ValueError(f"the tokenizer defines no {name}; a Janus tokenizer has bos, eos, pad and boi tokens")

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.lm_head.weight.dtype

    @property
    def num_image_tokens(self) -> int:
        return self.config.vision_config.num_image_tokens

    @property
    def max_context(self) -> int:
        return self.config.text_config.max_position_embeddings

    @property
    def decoder(self) -> Any:
        """The language model's body, an nn.Module: embeddings in, hidden states out."""
        return self.model.model.language_model

    @property
    def text_head(self) -> Head:
        return Head(self.model.lm_head.weight, self.model.lm_head.bias)

    @property
    def image_head(self) -> Head:
        """The last linear layer of the image head; `image_features` is what comes before it."""
        last = self.model.model.generation_head.vision_head
        return Head(last.weight, last.bias)

    def prompt_encoder(self, prompt_format: PromptFormat) -> PromptEncoder:
        return PromptEncoder(self.tokenizer, prompt_format, self.max_context)

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def embed_text(self, ids: Tensor) -> Tensor:
        """[..., L] int64 -> [..., L, D]."""
        return self.decoder.get_input_embeddings()(ids)

    def embed_image(self, tokens: Tensor) -> Tensor:
        """[..., L] int64 codes -> [..., L, D]: generation_aligner(generation_embeddings(token))."""
        return self.model.prepare_embeddings_for_image_generation(tokens)

    def image_features(self, hidden: Tensor) -> Tensor:
        """[..., D] hidden -> [..., D] features of the image head's last layer: GELU(proj_out(h))."""
        head = self.model.model.generation_head
        return head.activation_fn(head.proj_out(hidden))

    def text_hidden(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Tensor:
        """Hidden states that predict each completion token, packed: sum of completion lengths × D.

        Rows are right-padded and the attention is causal, so a row's result does not depend on the others.
        """
        rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
        hidden = self.decoder(inputs_embeds=self.embed_text(right_pad(rows, self.device)), use_cache=False)[0]
        lengths = zip(prompts, completions, strict=True)
        return torch.cat([hidden[s, len(p) - 1 : len(p) + len(c) - 1] for s, (p, c) in enumerate(lengths)])

    def image_hidden(self, prompts: Sequence[Sequence[int]], tokens: Tensor) -> Tensor:
        """Image-head features that predict each image token, packed: prompts S rows, tokens [S, T] -> [S·T, D]."""
        num_samples, num_tokens = tokens.shape
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        text = self.embed_text(right_pad(prompts, self.device))
        # token t of row s stands at position length_s + t; the last token predicts nothing and is left out
        slots = lengths[:, None] + torch.arange(num_tokens - 1, device=self.device)
        embeds = torch.cat([text, text.new_zeros(num_samples, num_tokens - 1, text.shape[-1])], dim=1)
        index = slots[..., None].expand(-1, -1, text.shape[-1])
        embeds = embeds.scatter(1, index, self.embed_image(tokens[:, :-1]).to(text.dtype))
        hidden = self.decoder(inputs_embeds=embeds, use_cache=False)[0]
        predicting = lengths[:, None] - 1 + torch.arange(num_tokens, device=self.device)
        rows = torch.arange(num_samples, device=self.device)[:, None]
        return self.image_features(hidden[rows, predicting].flatten(0, 1))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the Hugging Face layout: config.json, model.safetensors, generation_config.json, tokenizer files."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def load_policy(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    attn_implementation: Literal["sdpa", "eager"] = "sdpa",
    device: torch.device | str = "cpu",
    freeze: Sequence[str] = PUBLISHED_FREEZE,
) -> Policy:
    """Load a Janus checkpoint in Hugging Face layout.

    Args:
        path: a local folder or a hub id such as `deepseek-community/Janus-Pro-7B`.
        dtype: of the weights.
        attn_implementation: transformers' name; both take the sampler's per-row masks.
        device: where the weights go.
        freeze: prefixes of parameter names that do not train.

    Raises:
        FileNotFoundError: neither a folder nor a hub id that can be had.
        ValueError: another architecture, or a freeze prefix that matches no parameter.
    """
    try:
        config = AutoConfig.from_pretrained(path)
    except OSError as error:
        raise FileNotFoundError(
            f"model_name_or_path={str(path)!r} is neither a folder with a config.json "
            f"nor a model the hub gives: {error}"
        ) from error
    if config.model_type != "janus":
        raise ValueError(
            f"{path} is a {config.model_type!r} checkpoint; bicot trains Janus models "
            "(model_type 'janus', such as deepseek-community/Janus-Pro-7B)"
        )
    model: Any = JanusForConditionalGeneration.from_pretrained(
        path, dtype=dtype, attn_implementation=attn_implementation
    )
    model.to(device)
    names = [name for name, _ in model.named_parameters()]
    for prefix in freeze:
        if not any(name.startswith(prefix) for name in names):
            raise ValueError(f"freeze: no parameter of {path} begins with {prefix!r}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(freeze)))
    return Policy(model.eval(), AutoTokenizer.from_pretrained(path))
