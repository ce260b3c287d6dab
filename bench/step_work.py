"""The phases of a training step: which functions they are, and what no implementation of them can do without.

FLOPs are those of the matrices, two a weight and token (attention's are not counted), and of the picture decoder; bytes
are weights, keys and values, and optimizer state, each as often as it must be read or written. Both are of what a call
was really given.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..grpo import step, trainer
from ..grpo.config import Config
from ..grpo.distributed import Ranks
from ..grpo.optim import MasterAdamW
from ..grpo.trainer import Trainer
from ..kernels.grpo_loss import TokenStream
from ..model.decoder import Decoder
from ..model.engine import RolloutChunk
from ..model.policy import Policy
from ..model.prompts import PromptEncoder
from ..model.stages import ImageStage, PlanStage, Row
from ..model.vq import ImageDecoder
from ..model.weights import Weights
from ..rewards.ensemble import RewardHandle
from ..rewards.worker import Worker
from .ranges import Target, Work

STEP = "step"  # the range around all others; what none of them covers is idle
# In the order of a step. Where kernels of several phases run at once, the first in this list has the time: what works
# beside the decoder costs what it adds. Rewards come after all of them, under their own names.
PHASES = ["data", "weights", "tokenizer", "prefill", "text decode", "image decode", "rows", "reference", "forward"]
PHASES += ["loss", "backward", "optimizer", "communication", "metrics", "VQ", "reward wait"]
NO_FLOOR = {
    "communication": "the links between ranks are not measured",
    "weights": "a copy, which could be avoided",
}


def matrices(module: Any) -> int:
    """Weights of a module's matrices."""
    return sum(p.numel() for p in module.parameters() if p.ndim == 2)


def _decode(stage: PlanStage | ImageStage, head: int, rows: Sequence[Row], drawn: Sequence[int]) -> Work:
    """Row r draws drawn[r] tokens; a step reads all weights, each row's keys and values, and a shared prefix once."""
    policy = stage.weights.policy
    weights = matrices(policy.decoder.layers) + head
    cached = 0
    prefixes: dict[int, int] = defaultdict(int)
    for row, n in zip(rows, drawn, strict=True):
        cached += n * row.length + n * (n + 1) // 2
        prefixes[row.prefix_start] = max(prefixes[row.prefix_start], n * row.prefix_length)
    kv = stage.decoder.pool.bytes_per_token * (cached + sum(prefixes.values()))
    return Work(max(drawn) * weights * policy.dtype.itemsize + kv, 2 * weights * sum(drawn))


def plan_work(result: tuple[list[list[int]], Any], stage: PlanStage, rows: Sequence[Row], *_: Any) -> dict[str, Work]:
    head = stage.weights.policy.text_head.weight.numel()
    return {"text decode": _decode(stage, head, rows, [len(plan) for plan in result[0]])}


def image_work(
    result: object, stage: ImageStage, rows: Sequence[Row], unconditional: Sequence[Row], *_: Any
) -> dict[str, Work]:
    every, head = [*rows, *unconditional], matrices(stage.weights.policy.model.model.generation_head)
    return {"image decode": _decode(stage, head, every, [stage.length] * len(every))}


def prefill_work(result: None, decoder: Decoder, prompts: Sequence[Sequence[int]], *_: Any) -> dict[str, Work]:
    """Of the last layer nothing is wanted but keys and values."""
    policy, tokens = decoder.weights.policy, sum(map(len, prompts))
    *layers, last = policy.decoder.layers
    weights = sum(map(matrices, layers)) + matrices(last.self_attn.k_proj) + matrices(last.self_attn.v_proj)
    read = weights * policy.dtype.itemsize
    return {"prefill": Work(read + tokens * decoder.pool.bytes_per_token, 2 * weights * tokens)}


@functools.lru_cache(maxsize=1)
def _picture_flops(decoder: ImageDecoder, tokens: int) -> int:
    device = next(decoder.model.parameters()).device
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        decoder.model.decode(torch.zeros(1, tokens, dtype=torch.int64, device=device))
    return counter.get_total_flops()


def picture_work(result: Tensor, decoder: ImageDecoder, tokens: Tensor) -> dict[str, Work]:
    return {"VQ": Work(flops=len(tokens) * _picture_flops(decoder, tokens.shape[1]))}


def body_work(result: tuple[list[int], Any, Any], policy: Policy, *_: Any) -> dict[str, Work]:
    """Of the pass for which rows are laid out, and of the backward pass that follows."""
    return _pass_work(policy.decoder.layers, len(result[0]))


def features_work(
    result: list[TokenStream], policy: Policy, rollout: RolloutChunk, encoder: PromptEncoder, config: Config, *_: Any
) -> dict[str, Work]:
    """The image head's first layer, both ways."""
    if all(stream.name != "image" for stream in result):
        return {}
    rows_per_image = 2 if config.policy_logits == "guided" and config.cfg_weight != 1 else 1
    return _pass_work(policy.model.model.generation_head.proj_out, rows_per_image * rollout.image_tokens.numel())


def _pass_work(module: Any, tokens: int) -> dict[str, Work]:
    """Two FLOPs a weight and token; of a backward pass two, and two more where the weight trains."""
    weights = [p for p in module.parameters() if p.ndim == 2]
    forward = Work(flops=2 * sum(p.numel() for p in weights) * tokens)
    if not torch.is_grad_enabled():
        return {"reference": forward}
    return {
        "forward": forward,
        "backward": Work(flops=sum((2 + 2 * p.requires_grad) * p.numel() for p in weights) * tokens),
    }


def reference_work(
    result: object,
    policy: Policy,
    micro_batches: Sequence[RolloutChunk],
    encoder: PromptEncoder,
    config: Config,
    *_: Any,
) -> dict[str, Work]:
    """The heads of streams with a KL; `body_work` and `features_work` count the rest."""
    plans = sum(len(part.plans.values) for part in micro_batches) * ("text" in config.kl_streams)
    pictures = sum(part.image_tokens.numel() for part in micro_batches) * ("image" in config.kl_streams)
    heads = policy.text_head.weight.numel() * plans + policy.image_head.weight.numel() * pictures
    return {"reference": Work(flops=2 * heads)}


def loss_work(result: object, streams: Sequence[TokenStream], *_: Any, **options: Any) -> dict[str, Work]:
    """The logits, and their gradients' way back into the features and, where it trains, the head."""
    flops = 0
    for stream in streams:
        assert stream.weight is not None
        flops += (6 if stream.weight.requires_grad else 4) * len(stream.targets) * stream.weight.numel()
    return {"loss": Work(flops=flops)}


def collect_work(result: None, optimizer: MasterAdamW) -> dict[str, Work]:
    """Gradients of another dtype are read, and added to those of the masters."""
    pairs = zip(optimizer.parameters, optimizer.masters, strict=True)
    return {"optimizer": Work(sum(p.numel() * (p.itemsize + 4) for p, master in pairs if p is not master))}


def optimizer_work(result: Tensor, optimizer: MasterAdamW, *_: Any) -> dict[str, Work]:
    """The gradient is read twice, the first time for its norm; master and moments are read and written."""
    pairs = zip(optimizer.parameters, optimizer.masters, strict=True)
    return {"optimizer": Work(sum(p.numel() * (8 * 4 + (p is not master) * p.itemsize) for p, master in pairs))}


def _pass(*_: Any) -> str:
    return "forward" if torch.is_grad_enabled() else "reference"


def _reward(worker: Worker, *_: Any) -> str:
    return f"reward {worker.reward.name}"


TARGETS = [
    Target(Trainer, "_train_step", STEP),
    Target(Trainer, "_step_examples", "data"),
    Target(Weights, "refresh", "weights"),
    *(Target(PromptEncoder, method, "tokenizer") for method in ("plan_ids", "image_ids", "decode_plan")),
    Target(Decoder, "prefill", "prefill", prefill_work),
    Target(PlanStage, "run", "text decode", plan_work),
    Target(ImageStage, "run", "image decode", image_work),
    Target(ImageDecoder, "__call__", "VQ", picture_work),
    Target(Worker, "_run", _reward),
    Target(RewardHandle, "result", "reward wait"),
    Target(trainer, "reference_logprobs", "reference", reference_work),
    Target(step, "token_streams", _pass, features_work),
    Target(Policy, "lay_out", "rows", body_work),
    Target(step, "grpo_loss", "loss", loss_work),
    Target(torch.autograd, "backward", "backward"),
    Target(MasterAdamW, "collect", "optimizer", collect_work),
    Target(MasterAdamW, "step", "optimizer", optimizer_work),
    *(Target(Ranks, method, "communication") for method in ("sum", "max", "sum_gradients", "cat", "gather", "meet")),
    *(
        Target(trainer, function, "metrics")
        for function in ("reward_metrics", "reward_costs", "image_diversity", "plan_metrics", "on_host")
    ),
    Target(trainer, "group_advantages", "metrics"),
    Target(trainer, "draw_grid", "metrics"),
]
