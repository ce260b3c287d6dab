"""What a training step should take, from sizes and rates alone.

Decoding reads the weights, and keys and values of every row (rows x context: a shared prefix counts for each), or
multiplies them, whichever takes longer; all micro-batches of a step are rolled out together, in as few parts as rows
and memory allow. Prefill, training (6 FLOPs a weight and token, 8 where activations are recomputed, 2 more for the
reference model) and the picture decoder run at `mfu` of the rate of a matrix product; the image head is frozen and
lacks its gradient's product. AdamW reads and writes 32 bytes a trained weight, and beside bfloat16 weights 2 more and
6 for each micro-batch. Lengths of plans are normal, rounded, and cut to [1, longest], and all GPUs wait for the longest
of all their plans. What GPUs send each other hides behind nothing and has no latency: a reduce-scatter or an all-gather
takes (n-1)/n of its bytes, an all-reduce twice that, over the slower of a GPU's links in its node and all of the node's
links out. Rewards are hidden unless they are given seconds. Each kernel takes `launch_us` longer than its bytes or
FLOPs: 9 a layer and 10 beside them in a decode step, 45 a layer in a forward and 60 in a backward pass.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import NamedTuple

from .models import Shape

GIB = 2**30
# Kernels: of the engine as it is written; of transformers' layers as torch.profiler counts them, without views.
DECODE, HEAD, FORWARD, BACKWARD = 9, 10, 45, 60
KEPT, KEPT_TO_RECOMPUTE = 34, 2  # bytes a layer, token and hidden number in training (Korthikanti et al. 2022)


class GPU(NamedTuple):
    """GB/s of a copy, TFLOP/s of a matrix product, GiB of memory, microseconds of a kernel with nothing to do."""

    gbps: float
    tflops: float
    gib: float
    launch_us: float = 0.0


# H200: rates as measured. H100: the same processor; the bandwidth by the ratio of the data sheets, 3.35 to 4.8 TB/s.
# Launches: an estimate, with which they take 30 % of a decode step of Janus-Pro-1B at few rows.
GPUS = {"H200": GPU(4300, 790, 140, 1.1), "H100": GPU(3000, 790, 79, 1.1)}


@dataclass(frozen=True)
class Cluster:
    """GPUs, and GB/s that each sends to others: `within` its node, and `across`, to other nodes.

    Raises:
        ValueError: `zero` is neither 0 (replicas) nor 2 or 3, or there is no GPU.
    """

    gpu: GPU
    gpus: int = 1
    zero: int = 0
    per_node: int = 8
    within: float = 450.0  # NVLink of H100 and H200, one direction
    across: float = 50.0  # a port of 400 Gbit/s for each GPU

    def __post_init__(self) -> None:
        if self.zero not in (0, 2, 3) or min(self.gpus, self.per_node) < 1:
            given = f"zero={self.zero}, gpus={self.gpus}, per_node={self.per_node}"
            raise ValueError(f"{given}: zero must be 0, 2 or 3, and the others 1 or more")

    @property
    def link(self) -> float:
        """GB/s of a GPU in a ring over all: a node of several has as many rings as GPUs, and each its own port."""
        return self.within if self.gpus <= self.per_node else min(self.within, self.per_node * self.across)

    def seconds(self, nbytes: float) -> float:
        """Of a reduce-scatter or an all-gather of so many bytes; an all-reduce is both."""
        return (self.gpus - 1) / self.gpus * nbytes / self.link / 1e9


class Plans(NamedTuple):
    """Lengths: normal, rounded, and cut to [1, longest]."""

    mean: float = 80
    deviation: float = 0
    longest: int = 80

    def reach(self) -> list[float]:
        """The shares of plans that have 1, 2, … `longest` tokens or more."""
        if not self.deviation:
            return [float(t <= max(1, round(self.mean))) for t in range(1, self.longest + 1)]
        shorter = NormalDist(self.mean, self.deviation).cdf
        return [1.0, *(1 - shorter(t - 0.5) for t in range(2, self.longest + 1))]


@dataclass(frozen=True)
class Step:
    """What each GPU does: `prompts` x `generations` images. Tokens are of one sample, `itemsize` is of a weight."""

    shape: Shape
    prompts: int = 2
    generations: int = 8
    prompt_tokens: float = 200
    plans: Plans = field(default_factory=Plans)
    image_prompt_tokens: float = 160  # without <begin_of_image>
    image_tokens: int = 576
    rows_per_image: int = 2
    max_rows: int = 256
    accumulation: int = 2
    itemsize: int = 2
    fp8: bool = False  # keys and values
    reference: bool = True
    recompute: bool = False
    mfu: float = 0.6
    vq_flops: float = 570e9  # of a picture
    reward_seconds: float = 0.0  # of a picture, not hidden
    other_gib: float = 4.0  # rewards, picture decoder, workspaces

    @property
    def images(self) -> int:
        return self.prompts * self.generations

    @property
    def text_weights(self) -> int:
        return self.shape.layer_weights + self.shape.text_head_weights

    @property
    def image_weights(self) -> int:
        return self.shape.layer_weights + self.shape.image_head_weights

    @property
    def trained(self) -> int:
        """Weights of the body, its embeddings and its head."""
        return self.text_weights + self.shape.text_head_weights

    @property
    def weights(self) -> int:
        return self.trained + 2 * self.shape.image_head_weights

    @property
    def kv_bytes(self) -> int:
        """Of a token."""
        D, heads = self.shape.hidden, self.shape.heads
        return 2 * self.shape.layers * (D + 4 * heads if self.fp8 else D * self.itemsize)

    @property
    def plan_tokens(self) -> float:
        return sum(self.plans.reach())

    @property
    def tokens(self) -> float:
        """In training, of both stages; the prompts of a group, but for the plans, are computed once."""
        common = self.prompt_tokens + self.image_prompt_tokens - self.plan_tokens
        return common / self.generations + 2 * self.plan_tokens + self.image_tokens + 1


class Cost(NamedTuple):
    """Seconds, and what they are bound by."""

    seconds: float
    bound: str


@dataclass(frozen=True)
class Prediction:
    """Costs by "phase/part", phases as in a run's metrics (none if it does not fit); GiB but for keys and values."""

    images: int
    costs: dict[str, Cost]
    state_gib: float

    @property
    def seconds(self) -> float:
        return sum(cost.seconds for cost in self.costs.values()) if self.costs else math.inf

    @property
    def images_per_second(self) -> float:
        """Of all GPUs."""
        return self.images / self.seconds

    def by(self, what: str) -> dict[str, float]:
        """Seconds by "phase", or by what they are bound by ("bound")."""
        found: dict[str, float] = defaultdict(float)
        for name, cost in self.costs.items():
            found[cost.bound if what == "bound" else name.split("/")[0]] += cost.seconds
        return found

    def binds(self) -> tuple[str, float]:
        """What most of the step is bound by, and its share."""
        if not self.costs:
            return "memory", 1.0
        bound, seconds = max(self.by("bound").items(), key=lambda item: item[1])
        return bound, seconds / self.seconds


def slower(nbytes: float, flops: float, gpu: GPU, use: float = 1.0) -> Cost:
    """Whichever takes longer; products at a share `use` of their rate."""
    memory, compute = nbytes / gpu.gbps / 1e9, flops / gpu.tflops / use / 1e12
    return Cost(memory, "bandwidth") if memory > compute else Cost(compute, "compute")


def image_step(step: Step, images: float, context: float, gpu: GPU) -> Cost:
    """One token of all pictures, at a mean context of so many tokens."""
    rows = images * step.rows_per_image
    nbytes = step.image_weights * step.itemsize + rows * context * step.kv_bytes
    return slower(nbytes, 2 * step.image_weights * rows, gpu)


def text_step(step: Step, running: float, context: float, gpu: GPU, goes_on: float = 1.0) -> Cost:
    """One token of the plans that still run; `goes_on`: how likely any does of all that one waits for."""
    nbytes = goes_on * step.text_weights * step.itemsize + running * context * step.kv_bytes
    return slower(nbytes, 2 * step.text_weights * running, gpu)


def launches(step: Step, gpu: GPU) -> float:
    """Seconds of a decode step."""
    return (DECODE * step.shape.layers + HEAD) * gpu.launch_us / 1e6


def _waits(step: Step, cluster: Cluster) -> list[float]:
    """How likely it is that any plan of all GPUs has 1, 2, … tokens or more."""
    parts = math.ceil(step.images / step.max_rows)
    return [1 - (1 - reach) ** (step.images / parts * cluster.gpus) for reach in step.plans.reach()]


def _plans(step: Step, cluster: Cluster) -> Cost:
    parts = math.ceil(step.images / step.max_rows)
    seconds: dict[str, float] = defaultdict(float)
    for t, (reach, goes_on) in enumerate(zip(step.plans.reach(), _waits(step, cluster), strict=True), 1):
        cost = text_step(step, step.images / parts * reach, step.prompt_tokens + t, cluster.gpu, goes_on)
        seconds[cost.bound] += parts * cost.seconds
    return Cost(sum(seconds.values()), max(seconds, key=seconds.__getitem__))


def state_bytes(step: Step, cluster: Cluster) -> float:
    """Of a GPU while it trains, without keys and values. ZeRO-3 keeps a whole copy of the weights for rollouts."""
    zero, share = cluster.zero, 1 / cluster.gpus
    a_weight = 18 if step.itemsize < 4 else 12  # masters, moments, their gradients, those of a backward pass
    weights = step.weights * step.itemsize
    copies = (1 + share if zero == 3 else 1) + (0 if not step.reference else share if zero == 3 else 1)
    kept = (KEPT_TO_RECOMPUTE if step.recompute else KEPT) * step.shape.layers * step.shape.hidden
    activations = kept * step.images / step.accumulation * step.tokens
    optimizer = step.trained * a_weight * (share if zero else 1)
    return weights * copies + optimizer + activations + step.other_gib * GIB


def _messages(step: Step, cluster: Cluster) -> dict[str, float]:
    """Replicas sum float32 gradients once. Under ZeRO all travels as the weights are stored: gradients after every
    micro-batch, weights after the update (ZeRO-2), or before every pass and rollout (ZeRO-3)."""
    if not cluster.zero:
        return {"train/gradients": 2 * cluster.seconds(4 * step.trained)}
    once, model = cluster.seconds(step.itemsize * step.trained), cluster.seconds(step.itemsize * step.weights)
    gradients = {"train/gradients": step.accumulation * once}
    if cluster.zero == 2:
        return gradients | {"train/weights": once}
    reference = {"reference/weights": step.accumulation * model} if step.reference else {}
    return gradients | {"plan/weights": model, "train/weights": 2 * step.accumulation * model} | reference


def predict(step: Step, cluster: Cluster) -> Prediction:
    """A step of all GPUs."""
    gpu, images, mfu, size = cluster.gpu, step.images, step.mfu, step.itemsize
    body, used = step.shape.layer_weights, state_bytes(step, cluster)
    picture = (step.image_prompt_tokens + step.image_tokens) * step.rows_per_image * step.kv_bytes
    most = min(step.max_rows // step.rows_per_image, (gpu.gib * GIB - used) / picture)
    if most < 1:
        return Prediction(images * cluster.gpus, {}, used / GIB)
    parts = math.ceil(images / min(images, math.floor(most)))
    context = step.image_prompt_tokens + (step.image_tokens + 1) / 2
    drawn = image_step(step, images / parts, context, gpu)
    prompts = (images + parts * (step.rows_per_image - 1)) * step.image_prompt_tokens
    text_head = images * step.plan_tokens * step.shape.text_head_weights
    image_head = images * step.image_tokens * step.shape.image_head_weights
    bytes_of_weight = 32 + (size + step.accumulation * (size + 4) if size < 4 else 0)
    trained = step.trained / (cluster.gpus if cluster.zero else 1)
    tokens = images * step.tokens
    costs = {
        "plan/prefill": slower(body * size, 2 * body * step.prompts * step.prompt_tokens, gpu, mfu),
        "plan/decode": _plans(step, cluster),
        "draw/prefill": slower(parts * body * size, 2 * body * prompts, gpu, mfu),
        "draw/decode": Cost(parts * step.image_tokens * drawn.seconds, drawn.bound),
        "decode/pictures": slower(0, images * step.vq_flops, gpu, mfu),
        "reward/wait": Cost(images * step.reward_seconds, "rewards"),
        "train/body": slower(0, (8 if step.recompute else 6) * body * tokens, gpu, mfu),
        "train/heads": slower(0, 6 * text_head + 4 * image_head, gpu, mfu),
        "train/optimizer": slower(bytes_of_weight * trained, 0, gpu),
    }
    if step.reference:
        costs["reference/body"] = slower(0, 2 * body * tokens, gpu, mfu)
        costs["reference/heads"] = slower(0, 2 * (text_head + image_head), gpu, mfu)
    layers = step.accumulation * step.shape.layers * gpu.launch_us / 1e6
    of_passes = {"train": FORWARD * (1 + step.recompute) + BACKWARD, "reference": FORWARD * step.reference}
    kernels = {phase: count * layers for phase, count in of_passes.items()}
    kernels["plan"] = math.ceil(images / step.max_rows) * sum(_waits(step, cluster)) * launches(step, gpu)
    kernels["draw"] = parts * step.image_tokens * launches(step, gpu)
    costs |= {f"{phase}/launches": Cost(seconds, "launches") for phase, seconds in kernels.items() if seconds}
    costs |= {name: Cost(seconds, "links") for name, seconds in _messages(step, cluster).items()}
    return Prediction(images * cluster.gpus, costs, used / GIB)


def efficiency(step: Step, cluster: Cluster) -> float:
    """Images a second, as a share of those of GPUs that never wait for each other and have memory for all rows."""
    free = replace(cluster, gpu=cluster.gpu._replace(gib=math.inf), within=math.inf, across=math.inf)
    alone, together = (predict(step, replace(free, gpus=n)).by("phase")["plan"] for n in (1, free.gpus))
    waits = together - alone  # of prefill and weights, which wait for nobody, both have the same
    return (predict(step, free).seconds - waits) / predict(step, cluster).seconds
