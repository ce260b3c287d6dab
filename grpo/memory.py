"""How much of a GPU's memory a run takes, phase by phase, from its settings and the model's config.json alone.

The formulas count what PyTorch allocates. N tokens and M places (see model/sequences.py) of a micro-batch, D hidden,
I intermediate, Q and K the widths of queries and of keys, e bytes of the dtype. Autograd keeps of a layer

    e·N·(4·D + Q + 3·I) + e·M·(2·Q + 2·K)      both norms' inputs and outputs, attention's output, gate, up and their
                                               product; at the places queries, keys, values and attention's output

with `gradient_checkpointing: selective` no norm's output, no product, one copy of attention's output, and queries, keys
and values of the tokens instead of the places

    e·N·(2·D + Q + 2·K + 2·I) + e·M·Q

and with `gradient_checkpointing: true` its two inputs, 2·e·N·D, and one whole layer at a time. Backward of a layer has
in hand e·N·(2·D + 3·I) more. A pass without gradients holds at its widest e·N·(8·D + 4·I), and less where q, k, v and
gate, up lie side by side. The update's peak is the largest of these moments: the loss (the head's gradient in float32,
a chunk of logits), the first and the last layer's backward pass, the conversion of gradients to float32, and the sum
over ranks, in flat copies of at most 256 MiB. DeepSpeed sends each gradient as soon as it is there, through buckets.

The plan's samples are equally long, so M has no padding in it. In a run, `attn_implementation: sdpa` pads shorter
ones to the longest; the others do not, and take less.

A CPU holds a float32 copy of a bfloat16 chunk of logits beside that, which a GPU does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..kernels.linear_logprobs import CHUNK_BYTES
from .distributed import BUCKET_BYTES
from .optim import PART

MIB = 2**20


@dataclass(frozen=True)
class Shape:
    """What the formulas need of a model: widths, layers, rows of both heads, bytes of the dtype."""

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
        """Of a Janus model's config."""
        text = config.text_config
        dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            text.num_hidden_layers, text.hidden_size, text.intermediate_size, text.num_attention_heads * dim,
            text.num_key_value_heads * dim, text.vocab_size, config.vq_config.num_embeddings, itemsize,
        )  # fmt: skip


class Batch(NamedTuple):
    """A micro-batch: tokens and places of the pass, how many text and image tokens are predicted, and how often the
    images pass (twice where guided log-probs train)."""

    tokens: int
    places: int
    texts: int
    images: int
    passes: int = 1

    @classmethod
    def of(
        cls, prompts: int, group: int, plan_prompt: int, image_prompt: int, plan: int, image: int, guided: bool = False
    ) -> Batch:
        """`group` samples of each prompt; `image_prompt` is without the plan, and shared as `plan_prompt` is."""
        samples, picture = prompts * group, image_prompt + plan
        tokens = prompts * (plan_prompt + image_prompt) + samples * (plan - 1 + plan + image - 1)
        places = samples * (plan_prompt + plan - 1 + picture + image - 1)
        if guided:  # rows without the prompt are all alike up to the picture
            tokens, places = tokens + picture + samples * (image - 1), places + samples * (picture + image - 1)
        return cls(tokens, places, samples * plan, samples * image, 1 + guided)

    def part(self, tokens: int) -> Batch:
        """So many tokens of it, in its own proportions."""
        counts = (-(-count * tokens // self.tokens) for count in self[:-1])
        return Batch._make([*counts, self.passes])


class Training(NamedTuple):
    """What the optimizer holds, in bytes a trained weight, and over how many ranks ZeRO's stage divides it.

    `accumulated` is what gradients between micro-batches take beside the weights' own; 0 where those add up. ZeRO
    sends `bucket` gradients at a time, from `buffers` of them. `offloaded`: masters and moments are on the host.
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
        """Masters and moments of one rank, wherever they are."""
        return trained * (self.masters + self.moments) // (self.ranks if self.stage >= 1 else 1)

    def held(self, trained: int) -> int:
        """Those on the rank's GPU."""
        return 0 if self.offloaded else self.share(trained)


class Update(NamedTuple):
    """The update's memory at its peak, beyond weights, masters and moments."""

    gradients: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(self)


def layer_bytes(shape: Shape, batch: Batch) -> int:
    """What autograd keeps of one layer."""
    each = 4 * shape.hidden + shape.queries + 3 * shape.intermediate
    return shape.bytes * (batch.tokens * each + batch.places * 2 * (shape.queries + shape.keys))


def selective_bytes(shape: Shape, batch: Batch) -> int:
    """The same with `gradient_checkpointing: selective`."""
    each = 2 * shape.hidden + shape.queries + 2 * shape.keys + 2 * shape.intermediate
    return shape.bytes * (batch.tokens * each + batch.places * shape.queries)


def reference_bytes(shape: Shape, batch: Batch) -> int:
    """The most that a pass without gradients allocates; parts of q, k, v and of gate, up beside their whole."""
    return shape.bytes * batch.tokens * (8 * shape.hidden + 4 * shape.intermediate)


def forward_bytes(shape: Shape, batch: Batch, recompute: bool | str) -> tuple[int, int]:
    """What a forward pass keeps of the layers, and of what follows them up to the loss."""
    stream = shape.bytes * batch.tokens * shape.hidden
    if recompute is True:
        kept = (2 * shape.layers - 1) * stream
    else:
        kept = shape.layers * (selective_bytes if recompute else layer_bytes)(shape, batch)
    images, guided = batch.images * batch.passes, batch.passes - 1
    return kept, stream + shape.bytes * shape.hidden * (2 * batch.texts + 3 * images + batch.images * guided)


def reference_tokens(shape: Shape, tokens: int, recompute: bool | str) -> int:
    """How many tokens may pass without gradients where a micro-batch has `tokens`: no more than its forward pass, which
    follows, keeps the memory of."""
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
    """The largest moment of an update.

    Args:
        trained: weights of each parameter that trains.
        head: weights of the heads that train.
        recompute: `gradient_checkpointing`.
        embedding: weights of the text's embedding, if it trains; their gradient comes after the last activation.
    """
    stream, layer = shape.bytes * batch.tokens * shape.hidden, layer_bytes(shape, batch)
    every = recompute is True
    backward = shape.bytes * batch.tokens * (2 * shape.hidden + 3 * shape.intermediate)
    kept, ends = forward_bytes(shape, batch, recompute)
    # what the streams still hold after backward
    hidden = shape.bytes * shape.hidden * (batch.texts + batch.images * batch.passes)
    rows = max(batch.texts * shape.vocab, batch.images * shape.codes)
    chunk = min(CHUNK_BYTES, shape.bytes * rows)
    weights, largest = sum(trained), max(trained, default=0)
    head_wide, head_own = 4 * head, shape.bytes * head
    if training.stage:  # float32 sums of all, or of this rank's share
        before = 4 * weights // (training.ranks if training.stage >= 2 else 1)
        own = shape.bytes * largest
        # ZeRO-1 sends from float32 buckets; the others widen what they send
        sent = training.bucket * training.buffers * (4 if training.stage == 1 else shape.bytes)
        sent += 4 * max(training.bucket, largest) * (training.stage >= 2 and shape.bytes < 4)
        wide = 0
    else:
        own, wide = shape.bytes * weights, training.accumulated * weights
        before, sent = (wide or own) if micro_batches > 1 else 0, 0
    held, late = (before if wide or training.stage else 0), shape.bytes * embedding
    fresh = head_own
    if before and not held:  # gradients add up where those of the micro-batch before are
        late = fresh = 0
    moments = [
        Update(before + head_wide, kept + ends, chunk),
        Update(before + head_wide + head_own + sent, kept + ends, 0),
        Update(before + fresh + sent, kept + hidden + backward + layer * every, 0),
        Update(held + own + sent - (0 if training.stage else late), layer + backward + hidden, 0),
        Update(held + own + sent, stream + hidden, 0),
    ]
    if wide:
        part = min(weights, max(PART, largest))
        most = (before + own + 4 * part) if before else wide + shape.bytes * part
        moments.append(Update(most, hidden, 0))
    if training.ranks > 1 and training.stage == 0:
        moments.append(Update((wide or own) + min(wide or own, BUCKET_BYTES), hidden, 0))
    return max(moments, key=lambda moment: moment.total)


def kv_tokens(prompts: int, group: int, prompt: int, limit: int, image: int, guided: bool) -> int:
    """Slots that RolloutEngine asks of the KV cache where all samples are one chunk, with the pool's own eighth."""
    samples, longest = prompts * group, prompt + limit + limit // 4
    pictures = samples * longest + guided * longest + samples * (1 + guided) * image
    tokens = max(prompts * (prompt - 1) + samples * limit, pictures)
    return tokens + tokens // 8
