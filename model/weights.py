"""The weights that the rollout engine reads from a policy: one tensor for each matrix product, with the newest values.

Decoding needs one matrix (q, k and v stacked; gate and up stacked) where the model has several modules. `refresh` finds
the cheapest way to follow training:

shared   The parameters become views of one tensor. An optimizer or a checkpoint that writes a parameter then writes
         what decoding reads, and nothing is ever copied. Parameters that already lie side by side, as in the flat
         buffers of DeepSpeed's ZeRO-1 and 2, are read where they are.
copied   Every refresh copies the values to the same tensor. This is for LoRA modules (PEFT, adapters.py), for
         parameters that DeepSpeed's ZeRO-3 shards, and for parameters that cannot be moved because something else
         shares their storage.

Copies keep their addresses, so that captured CUDA graphs stay valid. Modules are looked up by name at every refresh, in
case PEFT has wrapped them since. D is the hidden size, V a vocabulary.
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
        policy: read now, and again by every `refresh`. PEFT may add adapters to its model, and DeepSpeed may shard it,
            before this or later.

    Raises:
        ValueError: a language model that is no Llama, or adapters that are not plain LoRA.
    """

    def __init__(self, policy: Policy) -> None:
        config = policy.config.text_config
        if config.model_type != "llama" or config.hidden_act != "silu":
            raise ValueError(
                f"the language model is a {config.model_type!r} with {config.hidden_act!r}; the engine decodes Janus's "
                "Llama with 'silu'"
            )
        self.policy = policy
        self.kind = (policy.device, policy.dtype)  # those for which the tensors were made
        self._sources: list[Joined] = []
        self.embed_text = self.read("weight", "model.language_model.embed_tokens")
        self.layers = [Layer(self, f"model.language_model.layers.{i}") for i in range(config.num_hidden_layers)]
        self.norm = self.read("weight", "model.language_model.norm")
        self.text_head = Linear(self, "lm_head")
        self.text_mask: Tensor | None = None  # [V], -inf for ids that the tokenizer does not have, otherwise 0
        if ids := policy.unknown_ids:
            self.text_mask = torch.zeros(config.vocab_size, dtype=policy.dtype, device=policy.device)
            self.text_mask[ids] = -torch.inf
        self._image_projection = Linear(self, "model.generation_head.proj_out")
        self.image_head = Linear(self, "model.generation_head.vision_head")
        self._codes = self.read("weight", "model.generation_embeddings")
        depth = len(policy.model.model.generation_aligner.hidden_layers)
        names = ["fc1", *(f"hidden_layers.{i}" for i in range(depth))]
        self._aligner = [Linear(self, f"model.generation_aligner.{name}") for name in names]
        # not the policy's own module: ZeRO-3 needs equal calls of a module on all ranks, and these differ
        self._activation = ACT2FN[policy.config.vq_config.hidden_act]
        self.image_decoder = ImageDecoder(policy)
        self._vq_state: list[tuple[int, int]] | None = None
        self.embed_image: Any = None  # [codes, D], the embedding of each image token
        self.refresh()

    def read(self, attribute: str, *names: str) -> Joined:
        """An attribute of the modules with these names, joined; it has a tensor after the next refresh."""
        self._sources.append(Joined(attribute, names))
        return self._sources[-1]

    @property
    def has_biases(self) -> bool:
        """Whether a linear layer of a decoder layer has a bias."""
        linears = (linear for x in self.layers for linear in (x.qkv, x.out, x.gate_up, x.down))
        return any(linear.bias is not None for linear in linears)

    def image_features(self, hidden: Tensor) -> Tensor:
        """[R, D] hidden -> [R, D], the input of `image_head`."""
        return self._activation(self._image_projection(hidden))

    @torch.no_grad()
    @record_function("weights")
    def refresh(self) -> bool:
        """Bring all weights up to date with training. Under ZeRO-3 all ranks call this together.

        A frozen VQ model is copied again only if PyTorch has counted a write to it, so not after `weight.data.mul_(2)`.

        Returns:
            Whether a tensor has moved in memory, which makes captured CUDA graphs invalid. This happens only after the
            parameters themselves have moved.

        Raises:
            ValueError: the policy has another device or dtype than before.
        """
        kind = (self.policy.device, self.policy.dtype)
        if kind != self.kind:
            raise ValueError(f"the policy changed from {self.kind} to {kind}: build a new RolloutEngine")
        modules = {"": self.policy.model}  # by name, each looked up once
        moved = [source.refresh(modules) for source in self._sources]
        vq = self.policy.model.model.vqmodel
        if (state := _state(vq)) is None or state != self._vq_state:
            with unsharded(vq.parameters()):
                self.image_decoder.refresh(vq, merged)
            self._vq_state = state
        table = self._aligner[0](self._codes.tensor)
        for layer in self._aligner[1:]:
            table = layer(self._activation(table))
        self.embed_image = table if self.embed_image is None else self.embed_image.copy_(table)
        return any(moved)


class Joined:
    """One attribute of one or more modules, concatenated along dimension 0: `tensor`, None if the modules have none."""

    def __init__(self, attribute: str, names: Sequence[str]) -> None:
        self.attribute, self.names = attribute, names
        self.tensor: Any = None
        self.copied = False
        # if `tensor` is shared: each module, its parameter, and the parameter's address
        self._read: list[tuple[nn.Module, Tensor | None, int]] = []

    def refresh(self, known: dict[str, nn.Module]) -> bool:
        """Bring `tensor` up to date -> whether it has moved. `known`: modules by name, which this adds to."""
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
        with unsharded(p for module in modules for p in module.parameters()):
            values = [merged(module, self.attribute) for module in modules]
            if not copied_before and all(value is None for value in values):
                self.copied = False
                return False
            for i, module in enumerate(modules):
                if values[i] is None:  # the adapter of this module has no bias or is off, but another module has one
                    values[i] = module.weight.new_zeros(len(module.weight))
            sizes = [len(value) for value in values]
            if not copied_before:  # a shared tensor belongs to the policy: do not copy into it
                self.tensor = values[0].new_empty(sum(sizes), *values[0].shape[1:])
            for own, value in zip(self.tensor.split(sizes), values, strict=True):
                own.copy_(value)
        return not copied_before

    def _unchanged(self, module: nn.Module, read: tuple[nn.Module, Tensor | None, int]) -> bool:
        before, parameter, address = read
        # not getattr, which would cost more than everything else here
        same = module is before and module._parameters.get(self.attribute) is parameter
        return same and (parameter is None or parameter.data_ptr() == address)

    def _shared(self, parameters: Sequence[Tensor]) -> Tensor | None:
        """One view of all parameters, which are moved together if needed; None if they must not be moved."""
        if any(not isinstance(p, nn.Parameter) or hasattr(p, "ds_id") for p in parameters):
            return None  # computed by PEFT; or sharded by ZeRO-3, which allocates and frees their storage
        shared = side_by_side(parameters)
        if shared is None and all(is_alone(parameter, self.tensor) for parameter in parameters):
            shared = move_together(parameters)
        return shared


class Linear:
    """One or more nn.Linear modules with the same input, as one: weight [out, in], bias [out] or None."""

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
    """The weights of one Llama layer."""

    def __init__(self, weights: Weights, name: str) -> None:
        self.attention_norm = weights.read("weight", f"{name}.input_layernorm")
        self.qkv = Linear(weights, *(f"{name}.self_attn.{which}_proj" for which in "qkv"))
        self.out = Linear(weights, f"{name}.self_attn.o_proj")
        self.mlp_norm = weights.read("weight", f"{name}.post_attention_layernorm")
        self.gate_up = Linear(weights, f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj")
        self.down = Linear(weights, f"{name}.mlp.down_proj")


def _module(name: str, known: dict[str, nn.Module]) -> nn.Module:
    """The submodule of `known[""]` with this name."""
    if name not in known:
        parent, _, child = name.rpartition(".")
        known[name] = getattr(_module(parent, known), child)
    return known[name]


def _state(module: nn.Module) -> list[tuple[int, int]] | None:
    """The address and version of each parameter, which show whether one has changed. None if every refresh must copy:
    a parameter trains, a layer is adapted (adapters may be switched off), or ZeRO-3 has sharded the module, so that all
    ranks must gather it together."""
    parameters = list(module.parameters())
    changing = any(p.requires_grad or hasattr(p, "ds_id") for p in parameters) or any(map(is_adapted, module.modules()))
    return None if changing else [(p.data_ptr(), p._version) for p in parameters]


def gathered(model: nn.Module, keep: bool) -> dict[str, Tensor] | None:
    """The state dict of a model that ZeRO-3 has sharded, on the CPU of the ranks with `keep`. All ranks call this.

    None on other ranks, and for a model that is not sharded.
    """
    if not any(hasattr(p, "ds_id") for p in model.parameters()):
        return None
    state = {}
    for name, value in model.state_dict(keep_vars=True).items():
        with unsharded([value]):
            if keep:
                state[name] = value.detach().cpu()
    return state if keep else None


@contextmanager
def unsharded(parameters: Iterable[Any]) -> Iterator[None]:
    """Inside, parameters that ZeRO-3 has sharded are complete on every rank."""
    # not those that ZeRO-3 keeps complete: GatheredParameters would shard them at its end
    sharded = [p for p in parameters if hasattr(p, "ds_id") and p.numel() != p.ds_numel]
    if not sharded:
        yield
        return
    from deepspeed import zero

    with zero.GatheredParameters(sharded):
        yield
