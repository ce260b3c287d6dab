"""What the decode engine reads of a policy, one tensor for each matrix product, always the newest values.

A matrix that decoding wants whole (q, k and v stacked; gate and up stacked) is spread over several modules. For each,
`refresh` finds the cheapest way that keeps up with training:

shared   The parameters become views of one tensor. Whoever writes a parameter (an optimizer, a checkpoint) writes what
         decoding reads: nothing is copied, then or later. Parameters that already lie side by side, as in the flat
         buffers of DeepSpeed's ZeRO-1 and 2, are read where they are.
copied   anew by every refresh, in place: LoRA modules (PEFT, adapters.py), parameters that DeepSpeed's ZeRO-3
         shards, and those that lie apart in storage that is not theirs.

Copies keep their addresses, so that captured CUDA graphs stay valid. Modules are found by name at every refresh: one
that PEFT wraps later counts. D is the hidden size, V a vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from transformers.activations import ACT2FN

from .adapters import is_adapted, merged, unmerged
from .body import is_alone, move_together, side_by_side
from .policy import Policy
from .vq import ImageDecoder


class Weights:
    """The policy's decoder layers, embeddings, heads and picture decoder.

    Args:
        policy: read now, and at every `refresh`. Its `model` is the transformers module, which PEFT may have adapted
            and DeepSpeed sharded, before or after.

    Raises:
        ValueError: a body that is not Llama's, or adapters that are not plain LoRA.
    """

    def __init__(self, policy: Policy) -> None:
        config = policy.config.text_config
        if config.model_type != "llama" or config.hidden_act != "silu":
            raise ValueError(
                f"the language model is a {config.model_type!r} with {config.hidden_act!r}; the engine decodes Janus's "
                "Llama with 'silu'"
            )
        self.policy = policy
        self._kind = (policy.device, policy.dtype)
        self._sources: list[Joined] = []
        self.embed_text = self.read("weight", "model.language_model.embed_tokens")
        self.layers = [Layer(self, f"model.language_model.layers.{i}") for i in range(config.num_hidden_layers)]
        self.norm = self.read("weight", "model.language_model.norm")
        self.text_head = Linear(self, "lm_head")
        self.text_mask: Tensor | None = None  # [V], -inf for ids that the tokenizer does not have, and else 0
        if ids := policy.unknown_ids:
            self.text_mask = torch.zeros(config.vocab_size, dtype=policy.dtype, device=policy.device)
            self.text_mask[ids] = -torch.inf
        self._image_projection = Linear(self, "model.generation_head.proj_out")
        self.image_head = Linear(self, "model.generation_head.vision_head")
        self._codes = self.read("weight", "model.generation_embeddings")
        depth = len(policy.model.model.generation_aligner.hidden_layers)
        names = ["fc1", *(f"hidden_layers.{i}" for i in range(depth))]
        self._aligner = [Linear(self, f"model.generation_aligner.{name}") for name in names]
        # not the policy's own module: ZeRO-3 counts its calls, and ranks call it as often as their chunks need
        self._activation = ACT2FN[policy.config.vq_config.hidden_act]
        self.image_decoder = ImageDecoder(policy)
        self._vq_state: list[tuple[int, int]] | None = None
        self.embed_image: Any = None  # [codes, D]: what each image token is to the language model
        self.refresh()

    def read(self, attribute: str, *names: str) -> Joined:
        """The attribute of the modules so named, from the next refresh on."""
        self._sources.append(Joined(attribute, names))
        return self._sources[-1]

    def image_features(self, hidden: Tensor) -> Tensor:
        """[R, D] hidden -> [R, D], the input of `image_head`."""
        return self._activation(self._image_projection(hidden))

    @torch.no_grad()
    @record_function("weights")
    def refresh(self) -> bool:
        """Take over what training has written. Under ZeRO-3 all ranks call this together.

        Returns:
            Whether a tensor has moved, which makes captured graphs invalid: only after the parameters themselves have.

        Raises:
            ValueError: the policy has another device or dtype than before.
        """
        kind = (self.policy.device, self.policy.dtype)
        if kind != self._kind:
            raise ValueError(f"the policy was {self._kind} and is {kind} now: build its RolloutEngine after that")
        modules = {"": self.policy.model}  # by name, each looked up once
        moved = [source.refresh(modules) for source in self._sources]
        vq = self.policy.model.model.vqmodel
        if (state := _state(vq)) is None or state != self._vq_state:
            with whole(vq.parameters()):
                self.image_decoder.refresh(vq, merged)
            self._vq_state = state
        table = self._aligner[0](self._codes.tensor)
        for layer in self._aligner[1:]:
            table = layer(self._activation(table))
        self.embed_image = table if self.embed_image is None else self.embed_image.copy_(table)
        return any(moved)


class Joined:
    """The rows of one attribute of one or more modules, as one tensor: `.tensor`, None where the modules have none."""

    def __init__(self, attribute: str, names: Sequence[str]) -> None:
        self.attribute, self.names = attribute, names
        self.tensor: Any = None
        self.copied = False
        self._read: list[tuple[nn.Module, Tensor | None, int]] = []  # what `tensor` shares, and where that lies

    def refresh(self, known: dict[str, nn.Module]) -> bool:
        """Bring `tensor` up to date -> whether it has moved. `known` modules by name; it grows."""
        modules: list[Any] = [_module(name, known) for name in self.names]
        if self._read and all(map(self._unchanged, modules, self._read)):
            return False
        parameters = [unmerged(module, self.attribute) for module in modules]
        self._read = []
        before, copied_before, adapted = self.tensor, self.copied, any(map(is_adapted, modules))
        if parameters[0] is None and not adapted:
            self._read = [(module, None, 0) for module in modules]
            self.tensor, self.copied = None, False
            return before is not None
        shared = self._shared(parameters) if not adapted else None
        self.copied = shared is None
        if shared is not None:
            self.tensor = shared
            self._read = [(m, p, p.data_ptr()) for m, p in zip(modules, parameters, strict=True)]
            return before is None or before.data_ptr() != shared.data_ptr()
        with whole(p for module in modules for p in module.parameters()):
            values = [merged(module, self.attribute) for module in modules]
            if not copied_before and all(value is None for value in values):
                self.copied = False
                return False
            for i, module in enumerate(modules):
                if values[i] is None:  # an adapter of another module adds a bias, or that of this one is switched off
                    values[i] = module.weight.new_zeros(len(module.weight))
            rows = [len(value) for value in values]
            if not copied_before:  # what was shared is the policy's own
                self.tensor = values[0].new_empty(sum(rows), *values[0].shape[1:])
            for part, value in zip(self.tensor.split(rows), values, strict=True):
                part.copy_(value)
        return not copied_before

    def _unchanged(self, module: nn.Module, read: tuple[nn.Module, Tensor | None, int]) -> bool:
        before, parameter, place = read
        # getattr would cost more than all else here
        same = module is before and module._parameters.get(self.attribute) is parameter
        return same and (parameter is None or parameter.data_ptr() == place)

    def _shared(self, parameters: Sequence[Tensor]) -> Tensor | None:
        """The parameters as one view of the storage they have, or get; None where that is not ours to give."""
        if any(not isinstance(p, nn.Parameter) or hasattr(p, "ds_id") for p in parameters):
            return None  # PEFT computes it; or ZeRO-3, where storage comes and goes
        shared = side_by_side(parameters)
        if shared is None and all(is_alone(parameter, self.tensor) for parameter in parameters):
            shared = move_together(parameters)
        return shared


class Linear:
    """weight [out, in] and bias [out] or None of one or more nn.Linear with the same input, their outputs stacked."""

    def __init__(self, weights: Weights, *names: str) -> None:
        self._weight, self._bias = weights.read("weight", *names), weights.read("bias", *names)

    @property
    def weight(self) -> Tensor:
        return self._weight.tensor

    @property
    def bias(self) -> Tensor | None:
        return self._bias.tensor

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self._weight.tensor, self._bias.tensor)


class Layer:
    """One block of Llama, as its transformers module has it."""

    def __init__(self, weights: Weights, name: str) -> None:
        self.attention_norm = weights.read("weight", f"{name}.input_layernorm")
        self.qkv = Linear(weights, *(f"{name}.self_attn.{which}_proj" for which in "qkv"))
        self.out = Linear(weights, f"{name}.self_attn.o_proj")
        self.mlp_norm = weights.read("weight", f"{name}.post_attention_layernorm")
        self.gate_up = Linear(weights, f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj")
        self.down = Linear(weights, f"{name}.mlp.down_proj")


def _module(name: str, known: dict[str, nn.Module]) -> nn.Module:
    """The module of that name below `known[""]`."""
    if name not in known:
        parent, _, child = name.rpartition(".")
        known[name] = getattr(_module(parent, known), child)
    return known[name]


def _state(module: nn.Module) -> list[tuple[int, int]] | None:
    """Where the parameters lie and how often they were written. None if that says nothing: one trains, and may change
    all the time, or ZeRO-3 has it, and then all ranks must gather it or none."""
    parameters = list(module.parameters())
    changing = any(p.requires_grad or hasattr(p, "ds_id") for p in parameters)
    return None if changing else [(p.data_ptr(), p._version) for p in parameters]


def gathered(model: nn.Module, keep: bool) -> dict[str, Tensor] | None:
    """The state of a model that ZeRO-3 has sharded, on the host, where `keep`; otherwise None. All ranks call this."""
    if not any(hasattr(p, "ds_id") for p in model.parameters()):
        return None
    state = {}
    for name, value in model.state_dict(keep_vars=True).items():
        with whole([value]):
            if keep:
                state[name] = value.detach().cpu()
    return state if keep else None


@contextmanager
def whole(parameters: Iterable[Any]) -> Iterator[None]:
    """Inside, parameters that ZeRO-3 has sharded are complete on every rank."""
    # those that it keeps complete are left alone: leaving the context would shard them
    sharded = [p for p in parameters if hasattr(p, "ds_id") and p.numel() != p.ds_numel]
    if not sharded:
        yield
        return
    from deepspeed import zero

    with zero.GatheredParameters(sharded):
        yield
