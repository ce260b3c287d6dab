"""How much memory a step allocates on a GPU, computed from the settings and the model's config.json.

The formulas count what PyTorch allocates. N is the number of tokens of a micro-batch, and M the number of its places
(see model/sequences.py). D is the hidden width, I the intermediate width, Q and K are the widths of queries and keys,
and e is the number of bytes of the dtype.

Autograd keeps for each layer the inputs and outputs of both norms, the output of attention, gate, up and their product
for each token; and queries, keys, values and the output of attention for each place:

    e·N·(4·D + Q + 3·I) + e·M·(2·Q + 2·K)

With `gradient_checkpointing: selective` it keeps neither the outputs of the norms nor the product, only one copy of the
output of attention, and queries, keys and values for each token instead of each place:

    e·N·(2·D + Q + 2·K + 2·I) + e·M·Q

With `gradient_checkpointing: true` it keeps the two inputs of each layer, 2·e·N·D, and everything of one layer at a
time. The backward pass of a layer needs e·N·(2·D + 3·I) in addition. A pass without gradients needs at most
e·N·(8·D + 4·I), and less if q, k, v and gate, up are stored side by side.

The peak of the update is the largest of these moments: the loss (with the head's gradient in float32 and a slice of
logits); the backward pass of the first and of the last layer; and with several micro-batches, the moment when gradients
are added up in float32, 256 MiB at a time. With several ranks, gradients are sent in buckets as soon as they are
computed.

All samples of the plan have the same length, so M contains no padding. In a run, `attn_implementation: sdpa` pads
shorter samples to the longest one. The other implementations do not, and need less.

A CPU needs a float32 copy of a bfloat16 slice of logits in addition; a GPU does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..kernels.linear_logprobs import LOGITS_BYTES
from .gradients import BUCKET_BYTES


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that the formulas need; `vocab` and `codes` are the numbers of text and image tokens."""

    layers: int
    hidden: int
    intermediate: int
    queries: int
    keys: int
    vocab: int
    codes: int
    bytes: int

    @classmethod
    def of(cls, config: Any, itemsize: int) -> Shape:
        """The sizes in a Janus model's config."""
        text = config.text_config
        dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            text.num_hidden_layers, text.hidden_size, text.intermediate_size, text.num_attention_heads * dim,
            text.num_key_value_heads * dim, text.vocab_size, config.vq_config.num_embeddings, itemsize,
        )  # fmt: skip


class Batch(NamedTuple):
    """The sizes of a micro-batch.

    `tokens` and `places` count the sequences of the forward pass, `texts` and `images` the tokens that are predicted.
    `passes` is how many sequences a picture has: two if guided log-probs are trained.
    """

    tokens: int
    places: int
    texts: int
    images: int
    passes: int = 1

    @classmethod
    def of(
        cls, prompts: int, group: int, plan_prompt: int, image_prompt: int, plan: int, image: int, guided: bool = False
    ) -> Batch:
        """`group` samples of each prompt. `image_prompt` does not count the plan; a group shares both prompts."""
        samples, picture = prompts * group, image_prompt + plan
        tokens = prompts * (plan_prompt + image_prompt) + samples * (plan - 1 + plan + image - 1)
        places = samples * (plan_prompt + plan - 1 + picture + image - 1)
        if guided:  # unconditional sequences share all tokens in front of the picture
            tokens, places = tokens + picture + samples * (image - 1), places + samples * (picture + image - 1)
        return cls(tokens, places, samples * plan, samples * image, 1 + guided)

    def part(self, tokens: int) -> Batch:
        """A part with this many tokens, in the same proportions."""
        counts = (-(-count * tokens // self.tokens) for count in self[:-1])
        return Batch._make([*counts, self.passes])


class Training(NamedTuple):
    """What the optimizer holds, in bytes for each trained weight.

    Args:
        masters, moments: bytes of the master weight and of both moments.
        accumulated: bytes of a separate sum of gradients; 0 if they add up in the weight's own gradient.
        ranks: number of ranks among which ZeRO divides them.
        stage: ZeRO's stage, 0 without DeepSpeed.
        bucket, buffers: ZeRO sends this many gradients at a time, from this many buffers.
        offloaded: masters and moments are in host memory.
    """

    masters: int = 4
    moments: int = 8
    accumulated: int = 4
    ranks: int = 1
    stage: int = 0
    bucket: int = 0
    buffers: int = 1
    offloaded: bool = False

    def share(self, trained: int) -> int:
        """Bytes of one rank's masters and moments, on the GPU or on the host."""
        return trained * (self.masters + self.moments) // (self.ranks if self.stage >= 1 else 1)

    def held(self, trained: int) -> int:
        """Bytes of these on the GPU."""
        return 0 if self.offloaded else self.share(trained)


class Update(NamedTuple):
    """Bytes that the update needs at a moment, in addition to weights, masters and moments."""

    gradients: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(self)


def layer_bytes(shape: Shape, batch: Batch) -> int:
    """Bytes that autograd keeps for one layer."""
    each = 4 * shape.hidden + shape.queries + 3 * shape.intermediate
    return shape.bytes * (batch.tokens * each + batch.places * 2 * (shape.queries + shape.keys))


def selective_bytes(shape: Shape, batch: Batch) -> int:
    """The same with `gradient_checkpointing: selective`."""
    each = 2 * shape.hidden + shape.queries + 2 * shape.keys + 2 * shape.intermediate
    return shape.bytes * (batch.tokens * each + batch.places * shape.queries)


def reference_bytes(shape: Shape, batch: Batch) -> int:
    """The most that a pass without gradients allocates. q, k, v and gate, up count twice: joined, and as parts."""
    return shape.bytes * batch.tokens * (8 * shape.hidden + 4 * shape.intermediate)


def forward_bytes(shape: Shape, batch: Batch, recompute: bool | str) -> tuple[int, int]:
    """Bytes that a forward pass keeps for the layers, and for what follows them up to the loss."""
    stream = shape.bytes * batch.tokens * shape.hidden
    if recompute is True:
        kept = (2 * shape.layers - 1) * stream
    else:
        kept = shape.layers * (selective_bytes if recompute else layer_bytes)(shape, batch)
    images, guided = batch.images * batch.passes, batch.passes - 1
    return kept, stream + shape.bytes * shape.hidden * (2 * batch.texts + 3 * images + batch.images * guided)


def reference_tokens(shape: Shape, tokens: int, recompute: bool | str) -> int:
    """How many tokens a pass without gradients may have, if a micro-batch has `tokens`.

    It is the number with which it needs no more memory than the micro-batch's forward pass, which comes later.
    """
    one = Batch(1, 0, 0, 0)
    return tokens * max(1, forward_bytes(shape, one, recompute)[0] // reference_bytes(shape, one))


def update_peak(
    shape: Shape,
    batch: Batch,
    trained: Sequence[int],
    head: int,
    training: Training,
    micro_batches: int,
    recompute: bool | str,
    embedding: int = 0,
) -> Update:
    """The moment of an update that needs the most memory.

    Args:
        trained: number of weights of each trained parameter.
        head: number of trained weights of the heads.
        recompute: the setting gradient_checkpointing.
        embedding: number of trained weights of the text embedding. Its gradient is computed last, when no activation
            is left.
    """
    stream, layer = shape.bytes * batch.tokens * shape.hidden, layer_bytes(shape, batch)
    every = recompute is True
    backward = shape.bytes * batch.tokens * (2 * shape.hidden + 3 * shape.intermediate)
    kept, ends = forward_bytes(shape, batch, recompute)
    # the streams hold their hidden states until after the backward pass
    hidden = shape.bytes * shape.hidden * (batch.texts + batch.images * batch.passes)
    logits = min(LOGITS_BYTES, shape.bytes * max(batch.texts * shape.vocab, batch.images * shape.codes))
    weights, largest = sum(trained), max(trained, default=0)
    head_wide, head_own = 4 * head, shape.bytes * head
    if training.stage:  # float32 sums of all gradients, or of this rank's share
        before = 4 * weights // (training.ranks if training.stage >= 2 else 1)
        own = shape.bytes * largest
        # ZeRO-1 has float32 buckets; stages 2 and 3 convert a bucket before they send it
        sent = training.bucket * training.buffers * (4 if training.stage == 1 else shape.bytes)
        sent += 4 * max(training.bucket, largest) * (training.stage >= 2 and shape.bytes < 4)
        wide = 0
    else:
        added = micro_batches > 1 or training.ranks > 1
        own, wide = shape.bytes * weights, training.accumulated * weights * added
        before, sent = (wide or own) if micro_batches > 1 else 0, 0
    held, late = (before if wide or training.stage else 0), shape.bytes * embedding
    fresh = head_own
    if before and not held:  # gradients are added in place to those of the micro-batches before
        late = fresh = 0
    bucket = min(weights, BUCKET_BYTES // 4)
    part, last = max(bucket, largest), sent
    if training.ranks > 1 and training.stage == 0:  # the gradients of a bucket are kept until it has all, and is sent
        sent, last = shape.bytes * bucket, shape.bytes * part
        if micro_batches == 1:  # the sums grow during the backward pass
            each = training.accumulated or shape.bytes
            fresh, late, held, own = each * head, each * embedding, each * weights, 0
    moments = [
        Update(before + head_wide, kept + ends, logits),
        Update(before + head_wide + head_own + sent, kept + ends, 0),
        Update(before + fresh + sent, kept + hidden + backward + layer * every, 0),
        Update(held + own + sent - (0 if training.stage else late), layer + backward + hidden, 0),
        Update(held + own + last, stream + hidden, 0),
    ]
    if wide and before:
        moments.append(Update(before + own + 4 * part, hidden, 0))
    return max(moments, key=lambda moment: moment.total)


def kv_tokens(prompts: int, group: int, prompt: int, limit: int, image: int, guided: bool) -> int:
    """Slots of the KV cache that RolloutEngine asks for if all samples are one chunk; the pool adds an eighth."""
    samples, longest = prompts * group, prompt + limit + limit // 4
    pictures = samples * longest + guided * longest + samples * (1 + guided) * image
    tokens = max(prompts * (prompt - 1) + samples * limit, pictures)
    return tokens + tokens // 8
