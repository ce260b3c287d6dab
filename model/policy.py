"""The policy is a Janus model with its tokenizer, its two heads, and its trainable parameters.

Shapes: S samples, T image tokens of a picture, D hidden, V a head's vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.profiler import record_function
from transformers import AutoConfig, AutoTokenizer, JanusForConditionalGeneration, PreTrainedConfig

from ..kernels.host import upload
from . import body
from .adapters import adapter_base, load_lora, merged
from .attention import Attention
from .convert import ORIGINAL, load_original, original_config, original_tokenizer
from .packed import int64
from .prompts import PromptEncoder, PromptFormat
from .sequences import Layout, Stream, fastest, lay_out, sequences_of, take
from .settings import RolloutSettings, save_for_transformers

# The published recipe trains the language model and its head, and freezes everything else.
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
    """A `JanusForConditionalGeneration`, and everything that this package does with it.

    Args:
        model: the transformers module; no parameter is copied.
        tokenizer: its tokenizer, with `boi_token` among its special tokens.

    `settings` has the prompt texts and the sampling of the checkpoint.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:  # Any: transformers' annotations are too loose to check
        self.model = model
        self.tokenizer = tokenizer
        self.config = self.model.config
        self.adapters: Any = None  # PEFT's model around `model`, if only LoRA adapters train
        self.attention = Attention()
        self.recomputes: bool | str = False
        self.settings = RolloutSettings()
        body.install(self.decoder)
        # If several threads make a process's first call, MKL can be right to four digits only (pytorch/pytorch#188792).
        # The engine would keep such tables of its rotary embedding, and differ from training.
        for function in (torch.cos, torch.sin):
            function(torch.ones(1, device="cpu"))
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
    def unknown_ids(self) -> list[int]:
        """Ids that pad the vocabulary and that the tokenizer does not have. They are never sampled."""
        known = set(self.tokenizer.get_vocab().values())
        return [i for i in range(self.config.text_config.vocab_size) if i not in known]

    @property
    def max_context(self) -> int:
        return self.config.text_config.max_position_embeddings

    @property
    def decoder(self) -> Any:
        """The language model without its head: an nn.Module from embeddings to hidden states."""
        return self.model.model.language_model

    @property
    def text_head(self) -> Head:
        """The head of the text vocabulary: the model's parameters, or with LoRA a merged copy."""
        head = self.model.lm_head
        return Head(merged(head, "weight"), merged(head, "bias"))

    @property
    def image_head(self) -> Head:
        """The last linear layer of the image head, in the same way. Its input is `image_features`."""
        head = self.model.model.generation_head.vision_head
        return Head(merged(head, "weight"), merged(head, "bias"))

    def prompt_encoder(self, prompt_format: PromptFormat) -> PromptEncoder:
        return PromptEncoder(self.tokenizer, prompt_format, self.max_context)

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def freeze(self) -> Policy:
        """Make this a reference model, which has no trainable parameters, and return it."""
        self.model.requires_grad_(False)
        body.join(self.decoder)
        return self

    def recompute(self, what: bool | str) -> None:
        """Set which activations the backward pass recomputes: True = all of them, in train mode; "selective" = those
        that take no matrix product (see body.py); False = none."""
        if what is True and self.recomputes is not True:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        elif what is not True and self.recomputes is True:
            self.model.gradient_checkpointing_disable()
        self.recomputes = what

    def without_adapters(self) -> AbstractContextManager[None]:
        """Inside, LoRA adapters are off: the policy is the model that training started from."""
        return self.adapters.disable_adapter() if self.adapters else nullcontext()

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

    def hidden(self, *streams: Stream) -> list[Tensor]:
        """Run one forward pass over the sequences of all streams. A prefix that neighbours share is computed once.

        Args:
            streams: each has prompts and completions, as ids. Ids beyond the text vocabulary are image tokens, as
                `image_ids` makes them.

        Returns:
            For each stream the hidden states that predict its completion tokens, packed: [Σ completion lengths, D].
        """
        ids, tables, layout = self.lay_out(sequences_of(streams))
        hidden = body.forward(self.decoder, self._embed(ids), layout, self.recomputes == "selective")
        predicting = [
            [i for tokens, p, c in zip(table, *stream, strict=True) for i in tokens[len(p) - 1 :][: len(c)]]
            for stream, table in zip(streams, tables, strict=True)
        ]
        return list(take(hidden, int64(list(chain(*predicting)))).split([len(at) for at in predicting]))

    @record_function("layout")
    def lay_out(self, blocks: Sequence[Sequence[Sequence[int]]]) -> tuple[list[int], list[list[list[int]]], Layout]:
        """Call `sequences.lay_out` for the policy's device and attention. The first call decides what `auto` is."""
        if self.attention.name == "auto":
            text = self.config.text_config
            shape = (text.num_attention_heads, text.num_key_value_heads, text.head_dim)
            self.attention.name = fastest(blocks, shape, self.device, self.dtype)
        return lay_out(blocks, self.device, self.attention.name)

    def image_ids(self, tokens: Sequence[Sequence[int]]) -> list[list[int]]:
        """Image tokens of each sample -> the ids that `hidden` takes."""
        vocab = self.config.text_config.vocab_size
        return [[vocab + token for token in sample] for sample in tokens]

    def _embed(self, ids: list[int]) -> Tensor:
        """[N, D] embeddings of N ids of text and image tokens."""
        vocab, tokens = self.config.text_config.vocab_size, int64(ids)
        is_image = (tokens >= vocab).long()
        order = is_image.argsort(stable=True)  # the text tokens, then the image tokens
        images = int(is_image.sum())
        text, image = upload(tokens[order], self.device).split([len(ids) - images, images])
        embedded = self.embed_text(text)
        embedded = torch.cat([embedded, self.embed_image(image[None] - vocab)[0].to(embedded.dtype)])
        return take(embedded, order.argsort())

    def save_pretrained(
        self,
        folder: str | Path,
        weights: dict[str, Any] | None = None,
        settings: RolloutSettings | None = None,
    ) -> None:
        """Write the Hugging Face layout: config.json, model.safetensors, generation_config.json, tokenizer, processor.

        With adapters, write PEFT's adapter_config.json and adapter_model.safetensors instead of the model.
        `weights` replace the model's own, which ZeRO-3 shards. `settings` are written as bicot.json; None = its own.
        """
        if self.adapters:
            card = Path(folder, "README.md")
            before = card.read_bytes() if card.exists() else None
            self.adapters.save_pretrained(folder, save_embedding_layers=False)  # "auto" would ask the hub
            card.unlink(missing_ok=True)  # PEFT's empty model card
            if before is not None:
                card.write_bytes(before)
        else:
            self.model.save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)
        settings = settings or self.settings
        settings.save(folder)
        save_for_transformers(folder, self.config, self.tokenizer, settings.sampling)


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a model's config.json. Raises FileNotFoundError if there is none."""
    try:
        raw = PreTrainedConfig.get_config_dict(path)[0]
    except OSError as error:
        if (file := Path(path, "config.json")).is_file():
            raise ValueError(f"{file} is not JSON, copy or download it again: {error}") from error
        neither = f"{str(path)!r} is neither a folder with a model's config.json nor a model on the hub"
        raise FileNotFoundError(f"{neither}{_newest(path)}: {error}") from error
    except AttributeError:  # its JSON is a list
        raw = {}
    if "model_type" not in raw:
        raise ValueError(f"{str(path)!r} has no config.json of a model, which names a model_type{_newest(path)}")
    return raw


def _newest(run: str | Path) -> str:
    """Text that names the newest checkpoint in the folder of a run; "" if it has none."""
    found = sorted(Path(run).glob("checkpoint-*/tokenizer_config.json"))
    return f"; did you mean its checkpoint {found[-1].parent}?" if found else ""


def load_policy(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    freeze: Sequence[str] = PUBLISHED_FREEZE,
) -> Policy:
    """Load a Janus checkpoint in Hugging Face layout or in DeepSeek's, or LoRA adapters with their base model.

    Args:
        path: a local folder or a hub id such as `deepseek-community/Janus-Pro-7B` or `deepseek-ai/Janus-Pro-7B`; or a
            folder with PEFT's adapter_config.json.
        dtype: of the weights.
        device: where the weights go.
        freeze: prefixes of the names of parameters that do not train.

    Raises:
        FileNotFoundError: `path` is no checkpoint folder, and no hub id that can be downloaded.
        ValueError: another architecture, a tokenizer larger than the vocabulary, another number of image tokens than
            the VQ model decodes, weights that are missing, unknown or of another shape, or a freeze prefix that matches
            none.
    """
    if base := adapter_base(path):
        policy = load_policy(base, dtype=dtype, device=device, freeze=freeze)
        policy.adapters = load_lora(policy.model, path).eval()
        policy.settings = RolloutSettings.load(path, base)
        return policy
    raw = read_config(path)
    model_type = raw.get("model_type")
    if model_type == ORIGINAL:
        tokenizer = original_tokenizer(path)
        config = original_config(path, raw, tokenizer)
        _check_sizes(path, config, tokenizer)
        model = load_original(path, config, tokenizer, dtype)
    elif model_type == "janus":
        tokenizer = _tokenizer(path)
        _check_sizes(path, AutoConfig.from_pretrained(path), tokenizer)
        model = _load(path, dtype)
    else:
        raise ValueError(
            f"{path} is a {model_type!r} checkpoint; bicot trains Janus models (model_type 'janus', such as "
            f"deepseek-community/Janus-Pro-7B, or {ORIGINAL!r}, such as deepseek-ai/Janus-Pro-7B)"
        )
    model.to(device)
    names = [name for name, _ in model.named_parameters()]
    for prefix in freeze:
        if not any(name.startswith(prefix) for name in names):
            raise ValueError(f"freeze: no parameter of {path} begins with {prefix!r}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(freeze)))
    policy = Policy(model.eval(), tokenizer)
    policy.settings = RolloutSettings.load(path)
    return policy


def _tokenizer(path: str | Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # its class depends on what is wrong with the files
        raise ValueError(
            f"{path}: the tokenizer cannot be read, copy tokenizer.json and tokenizer_config.json again: {error}"
        ) from error


def _load(path: str | Path, dtype: torch.dtype) -> Any:
    try:
        loaded: Any = JanusForConditionalGeneration.from_pretrained(
            path, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except (SafetensorError, OSError) as error:
        damaged = [file.name for file in Path(path).glob("*.safetensors") if not _opens(file)]
        what = ", ".join(damaged) or "the weights"
        raise OSError(f"{path}: {what} cannot be read, download it again: {error}") from error
    model, report = loaded
    shapes = [name for name, *_ in report["mismatched_keys"]]
    wrong = {
        "lacks {} weights": report["missing_keys"],
        "has {} unknown weights": report["unexpected_keys"],
        "has {} weights of another shape": shapes,
    }
    for what, found in wrong.items():
        if found:  # transformers would only warn, and fill in random values
            raise ValueError(f"{path} {what.format(len(found))}, such as {', '.join(sorted(found)[:3])}")
    return model


def _opens(file: Path) -> bool:
    """Whether a file of weights is whole, by its header."""
    try:
        with safe_open(file, "pt"):
            return True
    except (SafetensorError, OSError):
        return False


def _check_sizes(path: str | Path, config: Any, tokenizer: Any) -> None:
    """Find errors that would show only after sampling: ids without an embedding, pictures that cannot be decoded."""
    vocab, largest = config.text_config.vocab_size, max(tokenizer.get_vocab().values())
    if largest >= vocab:
        raise ValueError(
            f"{path}: the tokenizer has ids up to {largest}, but the model has {vocab} embeddings "
            "(text_config.vocab_size); use the tokenizer that the model was trained with"
        )
    tokens, side = config.vision_config.num_image_tokens, config.vq_config.num_patches
    if tokens != side**2:
        raise ValueError(
            f"{path}: vision_config.num_image_tokens is {tokens}, but the VQ model decodes a grid of {side} x {side} = "
            f"{side**2} image tokens (vision_config.image_size // patch_size); correct its config.json"
        )
