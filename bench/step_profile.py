"""step_profile: a training step's time, phase by phase and stream by stream, and how far each phase is from its floor.

python -m bicot.bench.step_profile [--device cpu|cuda] [--shape Janus-Pro-1B] [--steps 3] [--output FILE.json]
A trainer takes real steps. They are timed, the result is saved, and then as many steps run under torch.profiler, with
the phases of grpo/profile.py. Floors: the bytes (weights, keys and values, optimizer state, each as often as it must be
read or written) at the measured rate of a copy, or the FLOPs (two for each weight of a matrix and each token; attention
is not counted) at that of a matrix product, whichever takes longer. Communication has no floor, since the links between
ranks are not measured. FILE.trace.json.gz is for https://ui.perfetto.dev.
"""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import logging

from ..grpo.distributed import Ranks
from ..grpo.profile import profiled, step_times
from ..grpo.step import micro_batches_of
from ..model.chunk import RolloutChunk
from ..model.policy import Policy
from ..model.sequences import sequences_of
from .harness import command_line, copy_gbps, finish, gemm_tflops, joules, save, start
from .models import SHAPES, ShapeTrainer, published_config, toy_config

CLOSE = 0.6  # of the floor's rate: the phase is bound by what the floor is of
TINY = {"num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 6}


def matrices(module: Any) -> int:
    """The number of weights in a module's matrices."""
    return sum(p.numel() for p in module.parameters() if p.ndim == 2)


def training_flops(policy: Policy, parts: Sequence[RolloutChunk]) -> dict[str, float]:
    """FLOPs of the matrix products of the reference pass and of an update, by phase, without guided log-probs.

    Each token counts once, the common beginning of neighbours too.
    """
    layers, generation = policy.decoder.layers, policy.model.model.generation_head
    packed = plan = picture = 0
    for part in parts:
        prompts, plans, image_prompts, tokens = part.ids
        pairs = (prompts, plans), (image_prompts, policy.image_ids(tokens))
        packed += len(policy.lay_out(sequences_of(pairs))[0])
        plan, picture = plan + sum(map(len, plans)), picture + sum(map(len, tokens))
    heads = [(plan, policy.text_head.weight), (picture, policy.image_head.weight)]
    projection = 2 * matrices(generation.proj_out) * picture
    forward = 2 * matrices(layers) * packed + projection
    # gradients of the weights that train, and of all inputs from the first layer that trains on
    trained = sum(p.numel() for p in layers.parameters() if p.ndim == 2 and p.requires_grad)
    first = next((i for i, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters())), len(layers))
    return {
        "reference": forward + 2 * sum(tokens * weight.numel() for tokens, weight in heads),
        "forward": forward,
        "loss": sum((6 if weight.requires_grad else 4) * tokens * weight.numel() for tokens, weight in heads),
        "backward": 2 * (trained + sum(map(matrices, layers[first:]))) * packed
        + projection,  # of the frozen image head
    }


def floors(trainer: ShapeTrainer) -> dict[str, tuple[float, float]]:
    """Phase -> bytes and FLOPs that every implementation of the last step needs."""
    policy, config, rollout, pool = trainer.policy, trainer.config, trainer.rollout, trainer.engine.pool
    body, text = matrices(policy.decoder.layers), policy.text_head.weight
    generation, e = policy.model.model.generation_head, policy.dtype.itemsize
    prompts, plans, image_prompts, pictures = rollout.ids
    group, T = config.num_generations, policy.num_image_tokens
    guided = config.cfg_weight != 1
    of_groups = [len(ids) - 1 for ids in prompts[::group]]
    longest = max(map(len, image_prompts)) - 1
    filled = [sum(of_groups), sum(len(ids) - 1 for ids in image_prompts) + guided * longest]
    read = defaultdict[str, float](float)
    flops = defaultdict[str, float](float)
    # of the last layer nothing is wanted but keys and values
    last = policy.decoder.layers[-1]
    prefilled = body - matrices(last) + matrices(last.self_attn.k_proj) + matrices(last.self_attn.v_proj)
    read["prefill"] = 2 * prefilled * e + sum(filled) * pool.bytes_per_token
    flops["prefill"] = 2 * prefilled * sum(filled)
    # a decode step reads all weights, a row's own keys and values, and a shared prefix once
    steps = [len(plan) for plan in plans]
    cached = sum(n * (n + 1) // 2 for n in steps)
    cached += sum(max(steps[i * group :][:group]) * length for i, length in enumerate(of_groups))
    read["text decode"] = max(steps) * (body + text.numel()) * e + pool.bytes_per_token * cached
    flops["text decode"] = 2 * (body + text.numel()) * sum(steps)
    rows = len(pictures) * (1 + guided)
    cached = rows * T * (T + 1) // 2 + T * (filled[1] if guided else sum(len(ids) - 1 for ids in image_prompts))
    read["image decode"] = T * (body + matrices(generation)) * e + pool.bytes_per_token * cached
    flops["image decode"] = 2 * (body + matrices(generation)) * rows * T
    parts = micro_batches_of(policy, rollout, trainer.encoder, config)
    flops |= training_flops(policy, parts)
    if not trainer.reference:
        del flops["reference"]
    # the gradient is read twice, the first time for its norm; master and moments are read and written
    for p, master in zip(trainer.optimizer.parameters, trainer.optimizer.masters, strict=True):
        added = (len(parts) > 1 or trainer.ranks.size > 1) and p is not master  # in float32
        collected = len(parts) * (p.itemsize + 4) if added else 0
        gradient, rounded = 4 if added else p.itemsize, p.itemsize if p is not master else 0
        read["optimizer"] += p.numel() * (24 + 2 * gradient + rounded + collected)
    decoder = trainer.engine.weights.image_decoder.model
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        decoder.decode(rollout.image_tokens[:1])
    flops["VQ"] = len(pictures) * counter.get_total_flops()
    return {phase: (read[phase], flops[phase]) for phase in [*read, *flops]}


def with_floor(row: dict[str, Any], work: tuple[float, float] | None, gbps: float, tflops: float) -> dict[str, Any]:
    """Add to a phase's row its floor, and whether bandwidth or compute is the floor."""
    if not work:
        return row | {"floor_ms": None, "floor_of": None}
    floor, of = max((work[0] / gbps / 1e6, "bandwidth"), (work[1] / tflops / 1e9, "compute"))
    reached, binds = floor / row["ms"] if row["ms"] else 0.0, row["binds"]
    if binds.startswith(("launch", "work")):
        binds = f"{of}: {reached:.0%} of the floor's rate" if reached >= CLOSE else binds
        binds += "" if reached >= CLOSE else f", {reached:.0%} of the floor's rate ({of})"
    return row | {"floor_ms": round(floor, 3), "floor_of": of, "binds": binds}


def measure(trainer: ShapeTrainer, steps: int, result: dict[str, Any], output: Path | None, tiny: bool) -> None:
    """Add to the result what `steps` steps took, and what they took under the profiler."""
    device, config = trainer.ranks.device.type, trainer.config
    step_times(trainer, 1)
    on_gpu = device == "cuda"
    if on_gpu:
        result["note"] = f"Here, {trainer.memory_settings}."
        torch.cuda.reset_peak_memory_stats()
    before = joules() if on_gpu else None
    result |= step_times(trainer, steps, warm_up=0) | {"power": {}, "rows": [], "kernels": {}, "streams": {}}
    if before is not None:
        images = result["images"] // trainer.ranks.size * steps
        result["power"]["joules_per_image"] = round(((joules() or 0.0) - before) / images, 2)
    result["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20) if on_gpu else None
    copy, gemm = copy_gbps(device, tiny), gemm_tflops(device, getattr(torch, config.dtype), tiny)
    result["ceilings"] = {"copy_gbps": copy, "gemm_tflops": {config.dtype: gemm}}
    save(result, output)
    with tempfile.TemporaryDirectory() as folder:
        trace = output.with_suffix(".trace.json.gz") if output else Path(folder) / "trace.json.gz"
        result |= profiled(trainer, steps, trace)
    work = floors(trainer)
    result["rows"] = [with_floor(row, work.get(row["phase"]), copy, gemm) for row in result["rows"]]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--shape", choices=[*SHAPES], default="toy", help="random weights, unless it is the toy")
    parser.add_argument("--steps", type=int, default=3, help="profiled steps, in each of the two passes")
    arguments, result = start(parser, __doc__)
    logging.disable_progress_bar()
    ranks = Ranks.start() if "WORLD_SIZE" in os.environ else Ranks(0, 1, torch.device(arguments.device))
    settings = toy_config if arguments.shape == "toy" else published_config
    output = arguments.output if ranks.main else None
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = settings(eval_file=None, output_dir=folder, **TINY if arguments.tiny else {})
            trainer = ShapeTrainer(arguments.shape, 16 if arguments.shape == "tiny" else 576, config, ranks)
            measure(trainer, arguments.steps, result, output, arguments.tiny)
        if ranks.main:
            finish(result, output)
    finally:
        ranks.close()


if __name__ == "__main__":
    main()
