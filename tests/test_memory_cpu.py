"""The memory plan's formulas against every allocation of a small model's step on a CPU.

Hidden 256, four layers, 8,192 words: activations, gradients and moments are each tens of MiB. PyTorch does not count
what oneDNN takes for itself. On a CPU alone there are float32 copies of a bfloat16 slice of logits and of its hidden
states, since its matrix product does not write float32; a GPU's does.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import lru_cache, partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import killed
import pytest
import torch
from tiny import tiny_policy
from torch.profiler import ProfilerActivity, profile

from bicot.grpo import gradients, memory
from bicot.grpo.config import Config, RewardConfig
from bicot.grpo.distributed import Ranks
from bicot.grpo.memory import (
    Batch,
    Shape,
    Training,
    kv_tokens,
    layer_bytes,
    reference_bytes,
    selective_bytes,
    update_peak,
)
from bicot.grpo.optim import MasterAdamW
from bicot.grpo.step import reference_logprobs, split, update
from bicot.kernels.kv_pool import FP8
from bicot.model import body
from bicot.model.adapters import add_lora
from bicot.model.chunk import RolloutChunk
from bicot.model.engine import RolloutEngine
from bicot.model.kv import KVPool
from bicot.model.packed import Packed
from bicot.model.policy import Policy
from bicot.model.prompts import PromptEncoder, PromptFormat
from bicot.model.settings import Sampling

HIDDEN, INTERMEDIATE, LAYERS, VOCAB, CODES, IMAGE, PLAN = 256, 704, 4, 8192, 1024, 64, 40
PROMPTS, GROUP = 2, 4
MIB, CPU = 2**20, torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
ALONE = Ranks(0, 1, CPU)


def measured(work: Callable[[], Any]) -> tuple[int, int, Any]:
    """The most bytes that lived while this worked, beyond those before; how many it left; and its result."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most, live, result


@lru_cache
def rows() -> tuple[RolloutChunk, PromptEncoder]:
    """Plans and pictures of random tokens, plans of full length."""
    policy = model_of(torch.float32)
    encoder = policy.prompt_encoder(PromptFormat.from_files("t2i_r1", "", None))
    prompts = [f"a red circle and w{i}" for i in range(PROMPTS) for _ in range(GROUP)]
    draw, samples = torch.Generator().manual_seed(1), PROMPTS * GROUP
    plans = torch.randint(20, VOCAB, (samples, PLAN), generator=draw).tolist()
    pictures = [encoder.image_ids(p, encoder.decode_plan(plan), IMAGE) for p, plan in zip(prompts, plans, strict=True)]
    unused = torch.zeros(samples, IMAGE)
    chunk = RolloutChunk(
        prompts=Packed.of([encoder.plan_ids(prompt, PLAN) for prompt in prompts]),
        plans=Packed.of(plans),
        plan_logprobs=Packed.of([torch.zeros(PLAN)] * samples),
        plan_texts=[""] * samples,
        truncated=torch.ones(samples, dtype=torch.bool),
        image_prompts=Packed.of(pictures),
        image_tokens=torch.randint(CODES, (samples, IMAGE), generator=draw),
        image_logprobs=unused,
        guided_logprobs=unused,
        images=unused,
        spans=(),
    )
    return chunk, encoder


def model_of(dtype: torch.dtype) -> Policy:
    sizes = {"hidden": HIDDEN, "intermediate": INTERMEDIATE, "image_size": 16, "layers": LAYERS, "context": 512}
    policy = tiny_policy(**sizes, vocab=VOCAB, codes=CODES, kv_heads=2)
    policy.model.to(dtype)
    return policy


class Step:
    """A policy, its optimizer and a rollout; and what the formulas need to know of them."""

    def __init__(self, dtype: torch.dtype, micro_batches: int = 1, lora: bool = False, **changes: Any) -> None:
        self.policy, (rollout, self.encoder) = model_of(dtype), rows()
        prompts = PROMPTS // micro_batches
        self.config = Config(
            dtype=str(dtype).removeprefix("torch."), rewards=RewardConfig("scene"), num_generations=GROUP,
            per_device_train_batch_size=prompts, gradient_accumulation_steps=micro_batches,
            max_completion_length=PLAN, **{"beta": 0.0, **changes},
        )  # fmt: skip
        if lora:
            config = (8, 32, 0.0, self.config.lora_target_modules, self.config.freeze)
            self.policy.adapters = add_lora(self.policy.model, *config)
        body.join(self.policy.decoder)
        self.policy.recompute(self.config.gradient_checkpointing)
        self.optimizer = MasterAdamW(self.policy.trainable_parameters(), self.config)
        self.parts, self.micro_batches = split(rollout, self.config), micro_batches
        prompts_, plans, pictures, tokens = self.parts[0].ids
        blocks = [(prompts_, plans), (pictures, self.policy.image_ids(tokens))]
        if self.config.policy_logits == "guided":
            blocks.append(([self.encoder.unconditional_ids(len(p)) for p in pictures], blocks[1][1]))
        given = [[[*p, *c[:-1]] for p, c in zip(*block, strict=True)] for block in blocks]
        ids, _, layout = self.policy.lay_out(given)
        places = sum(rows * length for rows, length in (block.shape for block in layout.blocks))
        samples = prompts * GROUP
        self.batch = Batch(len(ids), places, samples * PLAN, samples * IMAGE, len(blocks) - 1)
        self.shape = Shape(LAYERS, HIDDEN, INTERMEDIATE, HIDDEN, HIDDEN // 2, VOCAB, CODES, dtype.itemsize)
        self.trained = [p.numel() for p in self.policy.trainable_parameters()]
        self.head = 0 if lora else VOCAB * HIDDEN
        wide = self.config.optim == "adamw_8bit" or dtype.itemsize >= 4
        self.training = Training(0, 8, 0) if wide else Training()
        if self.config.optim == "adamw_8bit":
            self.training = self.training._replace(moments=2)

    def update(self, ranks: Ranks = ALONE) -> None:
        advantages = torch.linspace(-1, 1, PROMPTS * GROUP)
        given = (self.parts, advantages, None, self.encoder, self.config, ranks)
        update(self.policy, self.optimizer, *given)

    def planned(self) -> int:
        how = self.config.gradient_checkpointing
        given = (self.shape, self.batch, self.trained, self.head, self.training, self.micro_batches, how, self.head)
        return update_peak(*given).total

    def only_here(self) -> int:
        """Float32 copies on a CPU: of the text's logits, its hidden states, and so much of the head's product."""
        if self.shape.bytes >= 4:
            return 0
        return 4 * self.batch.texts * (VOCAB + HIDDEN)


CASES = [
    {"gradient_checkpointing": how, "micro_batches": micro_batches}
    for how in (False, "selective", True)
    for micro_batches in (1, 2)
]
MORE_CASES = [  # in bfloat16 alone, to save time
    {**more, "gradient_checkpointing": how}
    for more in ({"lora": True}, {"policy_logits": "guided"})
    for how in (False, "selective", True)
]
MORE_CASES += [{"num_iterations": 2, "micro_batches": 2}]
TORCHAO = pytest.mark.skipif(not find_spec("torchao"), reason="needs torchao")


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *product(CASES, DTYPES),
        *((case, torch.bfloat16) for case in MORE_CASES),
        pytest.param({"optim": "adamw_8bit"}, torch.bfloat16, marks=TORCHAO),
    ],
)
def test_an_update_takes_what_the_plan_says(case: dict[str, Any], dtype: torch.dtype) -> None:
    """The plan says 3 % less to 15 % more than was measured; 5 % more at most where all activations are kept."""
    step = Step(dtype, **case)
    _, left, _ = measured(step.update)
    assert left == pytest.approx(step.training.moments * sum(step.trained), rel=0.03, abs=MIB)
    most, left, _ = measured(step.update)
    assert left == pytest.approx(0, abs=MIB / 8), "a step leaves nothing behind"
    planned = step.planned()
    above = 1.15 if case.get("gradient_checkpointing") is True else 1.05
    assert 0.97 * most <= planned + step.only_here() and planned <= above * most


def update_on_two_ranks(output: Path, world: dict[str, str]) -> None:
    """Recomputing makes gradients the peak. Buckets of 256 MiB would hold this small model whole."""
    gradients.BUCKET_BYTES = memory.BUCKET_BYTES = MIB
    with killed.joined(output, world, 60) as ranks:
        for dtype, micro_batches in product(DTYPES, (1, 2)):
            step = Step(dtype, micro_batches, gradient_checkpointing=True)
            step.training = step.training._replace(ranks=2)
            measured(partial(step.update, ranks))
            most, _, _ = measured(partial(step.update, ranks))
            planned = step.planned()
            assert 0.97 * most <= planned + step.only_here() and planned <= 1.15 * most, (dtype, micro_batches)


def test_an_update_on_two_ranks_takes_what_the_plan_says(tmp_path: Path) -> None:
    for rank, process in enumerate(killed.together(update_on_two_ranks, tmp_path)):
        killed.finish(tmp_path / f"{rank}.log", process)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lora", [False, True])
def test_a_reference_pass_takes_no_more_than_the_plan_says(lora: bool, dtype: torch.dtype) -> None:
    """Within 15 % where q, k, v are computed one by one, as adapters want it; two thirds where they are one product."""
    step = Step(dtype, lora=lora, beta=0.01)
    policy = step.policy if lora else step.policy.freeze()
    most, _, _ = measured(lambda: reference_logprobs(policy, step.parts, step.encoder, step.config))
    planned = reference_bytes(step.shape, step.batch)
    assert 0.97 * most <= planned + step.only_here() <= (1.15 if lora else 1.5) * most + step.only_here()


@pytest.mark.parametrize("dtype", DTYPES)
def test_selective_keeps_what_the_formula_says(dtype: torch.dtype) -> None:
    """The bytes that a forward pass leaves for the backward pass, with and without."""
    left = []
    for how in (False, "selective"):
        step = Step(dtype, gradient_checkpointing=how)
        prompts, plans, pictures, tokens = step.parts[0].ids
        streams = [(prompts, plans), (pictures, step.policy.image_ids(tokens))]
        left.append(measured(lambda step=step, streams=streams: step.policy.hidden(*streams))[1])
    saved = LAYERS * (layer_bytes(step.shape, step.batch) - selective_bytes(step.shape, step.batch))
    assert left[0] - left[1] == pytest.approx(saved, rel=0.01)
    N, e = step.batch.tokens, step.shape.bytes
    assert saved > LAYERS * e * N * (INTERMEDIATE + 3 * HIDDEN), "the activation, two norms, attention's output"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
def test_a_cache_takes_what_the_plan_says(dtype: torch.dtype) -> None:
    pool = KVPool(model_of(torch.float32).config.text_config, dtype, CPU, max_bytes=None)
    most, left, _ = measured(lambda: pool.reserve(1000))
    assert most == left == pool.slots * pool.bytes_per_token
    most, left, _ = measured(pool.release)
    assert left == -1126 * pool.bytes_per_token and pool.slots == 0


def test_an_engine_asks_for_the_slots_that_the_plan_says() -> None:
    policy, prompt = tiny_policy(context=256), "a red circle and w1"
    encoder = policy.prompt_encoder(PromptFormat.from_files("t2i_r1", "", None))
    engine, limit = RolloutEngine(policy, encoder), 40
    list(engine.generate([prompt] * 2, 3, Sampling(max_completion_length=limit, cfg_weight=2.0), seed=0))
    length = len(encoder.plan_ids(prompt, limit))
    assert engine.pool.slots == kv_tokens(2, 3, length, limit, policy.num_image_tokens, True) + 1
