"""rollout: a decode step of the image and of the text stage of a rollout, ours against transformers'.

python -m bicot.bench.bench_rollout [--device cpu|cuda] [--output FILE.json]
The toy, and random weights at true shapes. Rows are sequences: a picture has two, conditional and unconditional, with
guidance 5. A plan has one, and eight plans share a prompt. No plan ends early. A run begins near the middle of its
stage, from keys and values that are random and the same for all; prefill is not timed. Floor: the weights of layers,
last norm and head, and the keys and values of all sequences, a shared prefix once. Checked: the tokens of a greedy run
and the log-probs that ours records, against transformers' teacher forcing, relative to a sequence's largest logit minus
its mean logit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from ..kernels.dispatch import has_dependent_launch
from ..model.engine import KVDtype, RolloutEngine
from ..model.policy import Policy
from ..model.prompts import PromptFormat
from ..model.settings import Sampling
from ..model.stages import CachedSequence, ImageStage, PlanStage
from .harness import Case, Outputs, Provider, Unavailable, main, short
from .models import SHAPES, policy_of

GUIDANCE, GROUP, SEED = 5.0, 8, 7
# variants of ours
FP8, FUSED, EARLY, BOTH = "fp8 KV", "fused layers", "dependent launches", "fused layers, dependent launches"
NO_EOS = -1  # no token ends a plan
# bfloat16 rounds in every layer, and guidance multiplies what it rounded: 0.033 at Janus-Pro-1B's shapes. A context
# that misses one of 440 tokens gives 0.24 and more, a shared prefix that misses one 0.16 and more. fp8 rounds more, but
# only what the run itself writes.
EXACT, ROUNDED = 1e-4, 8e-2


class Stage(NamedTuple):
    """A sequence has `prompt` tokens before it, and writes `length`. top_k 0 = all."""

    name: str
    prompt: int
    length: int
    top_k: int = 0

    def tokens(self, samples: int, written: float) -> float:
        """The number of tokens in the cache when each sequence has written that number."""
        if self.name == "image":
            return (samples + 1) * self.prompt + 2 * samples * written
        return -(-samples // GROUP) * self.prompt + samples * written


IMAGE, TEXT = Stage("image", 160, 576), Stage("text", 200, 80, top_k=50)
TOY_IMAGE, TOY_TEXT = Stage("image", 28, 64), Stage("text", 16, 40)
TINY_IMAGE, TINY_TEXT = Stage("image", 9, 12), Stage("text", 7, 8, top_k=5)


class Inputs(NamedTuple):
    """Sequences whose keys and values lie in the engine's pool, and the stage that continues them."""

    engine: RolloutEngine
    decode: ImageStage | PlanStage
    stage: Stage
    rows: Sequence[CachedSequence]
    unconditional: Sequence[CachedSequence]
    steps: int

    @property
    def policy(self) -> Policy:
        return self.engine.policy

    def logits(self, hidden: Tensor) -> Tensor:
        model = self.policy.model
        return model.model.generation_head(hidden) if self.unconditional else model.lm_head(hidden)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed drawn tokens, [S, L] -> [R, L, D]."""
        return self.policy.embed_image(tokens.repeat(2, 1)) if self.unconditional else self.policy.embed_text(tokens)

    def first_embeds(self) -> Tensor:
        """Embed `<begin_of_image>` -> [R, 1, D]. Every sequence of either stage reads it first."""
        shape, token = (len(self.rows) + len(self.unconditional), 1), self.policy.tokenizer.boi_token_id
        return self.policy.embed_text(torch.full(shape, token, device=self.policy.device))

    def guided(self, logits: Tensor) -> Tensor:
        if not self.unconditional:
            return logits
        cond, uncond = logits.chunk(2)
        return uncond + GUIDANCE * (cond - uncond)

    def cache(self) -> DynamicCache:
        """Copy all keys and values to a cache of transformers (the scales of fp8 are 1)."""
        spans = [((r.prefix_start, r.prefix_length), (r.start, r.length)) for r in (*self.rows, *self.unconditional)]
        slots = [[slot for start, length in row for slot in range(start, start + length)] for row in spans]
        index, cache = torch.tensor(slots, device=self.policy.device), DynamicCache()
        for layer in range(self.engine.pool.layers):
            pools = self.engine.pool.layer(layer)[:2]
            keys, values = (pool[index].to(self.policy.dtype).transpose(1, 2).contiguous() for pool in pools)
            cache.update(keys, values, layer)
        return cache


def inputs(policy: Callable[[], Policy], stage: Stage, samples: int, drawn: int, steps: int, variant: str) -> Inputs:
    """Make samples that have drawn `drawn` tokens and go on for `steps` steps."""
    kv: KVDtype = "fp8" if variant == FP8 else "auto"
    engine = RolloutEngine(model := policy(), model.prompt_encoder(PromptFormat()), kv_dtype=kv, kv_bytes=2**50)
    engine.graphs.dependent_launches = variant in (EARLY, BOTH)
    engine.decoder.fused_linear = variant in (FUSED, BOTH)
    pool, own = engine.pool, drawn + steps
    needed = int(stage.tokens(samples, own))
    pool.reserve(needed)
    if pool.capacity < needed:
        raise Unavailable(f"of the {needed} tokens of its KV cache {pool.capacity} fit")
    unconditional: list[CachedSequence] = []
    decode: ImageStage | PlanStage
    if stage.name == "image":
        rows = [CachedSequence(0, 0, pool.take(stage.prompt + own), stage.prompt + drawn, s) for s in range(samples)]
        shared = pool.take(stage.prompt)
        unconditional = [CachedSequence(shared, stage.prompt, pool.take(own), drawn, s) for s in range(samples)]
        decode = ImageStage(engine.decoder, engine.graphs, samples, 2, steps)
    else:
        prompts = [pool.take(stage.prompt) for _ in range(0, samples, GROUP)]
        rows = [CachedSequence(prompts[s // GROUP], stage.prompt, pool.take(own), drawn, s) for s in range(samples)]
        decode = PlanStage(engine.decoder, engine.graphs, samples, steps)
    torch.manual_seed(1)
    for layer in range(pool.layers):
        keys, values, *scales = pool.layer(layer)
        for cache in (keys, values):
            cache.copy_(torch.randn(cache.shape, dtype=model.dtype, device=model.device))
        for scale in scales:
            if scale is not None:
                scale.fill_(1)
    return Inputs(engine, decode, stage, rows, unconditional, steps)


@torch.no_grad()
def ours(x: Inputs, *, greedy: bool = False) -> Outputs:
    """Draw tokens -> tokens, log-probs, and in the image stage guided log-probs, each [S, T]."""
    temperature, boi = float(not greedy), x.policy.tokenizer.boi_token_id
    if isinstance(x.decode, ImageStage):
        sampling = Sampling(image_temperature=temperature, image_top_k=x.stage.top_k, cfg_weight=GUIDANCE)
        return x.decode.run(x.rows, x.unconditional, boi, sampling, SEED)
    sampling = Sampling(temperature=temperature, top_k=x.stage.top_k)
    plans, logprobs = x.decode.run(x.rows, [boi] * len(x.rows), NO_EOS, sampling, SEED)
    return torch.tensor(plans, device=x.policy.device), torch.stack(logprobs)


@torch.no_grad()
def loop(given: tuple[Inputs, DynamicCache], *, greedy: bool = False) -> Outputs:
    x, cache = given
    embeds, tokens = x.first_embeds(), []
    for _ in range(x.steps):
        hidden = x.policy.decoder(inputs_embeds=embeds, past_key_values=cache, use_cache=True)[0]
        logits = x.guided(x.logits(hidden[:, -1]))
        if x.stage.top_k:
            logits = logits.masked_fill(logits < logits.topk(x.stage.top_k).values[:, -1:], -torch.inf)
        tokens.append(logits.argmax(-1, keepdim=True) if greedy else torch.multinomial(logits.softmax(-1), 1))
        embeds = x.embed(tokens[-1])
    return (torch.cat(tokens, 1),)


def truth(x: Inputs) -> Callable[[Outputs], float]:
    @torch.no_grad()
    def error_of(outputs: Outputs) -> float:
        tokens, *recorded = outputs
        assert tokens is not None and tokens.shape == (len(x.rows), x.steps), "not one token a sample and step"
        embeds = torch.cat([x.first_embeds(), x.embed(tokens[:, :-1])], 1)
        logits = x.logits(x.policy.decoder(inputs_embeds=embeds, past_key_values=x.cache(), use_cache=True)[0]).float()
        drawn_from = x.guided(logits)
        errors = []
        for z, logprob in zip((logits[: len(tokens)], drawn_from), (*recorded, None, None), strict=False):
            largest, chosen = z.amax(-1), z.gather(-1, tokens[..., None])[..., 0]
            scale = largest - z.mean(-1)
            if logprob is not None:
                errors.append((logprob - (chosen - z.logsumexp(-1))).abs() / scale)
            if z is drawn_from:
                errors.append((largest - chosen) / scale)
        return float(torch.stack(errors).amax())

    return error_of


def case(model: str, dtype: torch.dtype, device: str, stage: Stage, rows: int, steps: int, variant: str = "") -> Case:
    """The case of the `steps` in the middle of a stage. Only ours has variants."""
    shape, image, fp8 = SHAPES[model], stage.name == "image", variant == FP8
    samples, drawn = rows // 2 if image else rows, (stage.length - steps) // 2
    labels = {"model": model, "stage": stage.name, "rows": rows, "context": stage.prompt + drawn, "steps": steps}
    labels |= {"dtype": short(dtype)} | ({"variant": variant} if variant else {})
    providers = {"ours": Provider(ours, checked=partial(ours, greedy=True))}
    if not variant:
        note = "transformers' decoder with a DynamicCache, as the published T2I-R1 code draws"
        providers["eager"] = Provider(loop, note, lambda x: (x, x.cache()), partial(loop, greedy=True))
    weights = shape.layer_weights + (shape.image_head_weights if image else shape.text_head_weights)
    per_token = 2 * shape.layers * (shape.hidden + 4 * shape.heads if fp8 else shape.hidden * dtype.itemsize)
    return Case(
        labels,
        dtype,
        partial(inputs, partial(policy_of, model, dtype, device, steps), stage, samples, drawn, steps, variant),
        truth,
        providers,
        bytes=weights * dtype.itemsize + int(per_token * stage.tokens(samples, drawn + (steps + 1) / 2)),
        steps=steps,
        makes=("images", samples / stage.length) if image else ("tokens", samples),
        tolerance=EXACT if dtype == torch.float32 and not fp8 else ROUNDED,
    )


def cases(device: str, tiny: bool) -> list[Case]:
    """A run has few steps if a step takes long. On a CPU there are two layers of the true width."""
    if tiny:
        small = partial(case, "tiny", torch.float32, device, steps=4)
        return [small(TINY_IMAGE, 6), small(TINY_TEXT, 9, variant=FUSED), small(TINY_IMAGE, 4, variant=FP8)]
    if device == "cpu":
        toy = partial(case, "toy", torch.float32, device)
        wide = partial(case, "Janus-Pro-1B of 2 layers", torch.bfloat16, device, steps=16)
        true = [wide(stage, rows) for stage in (IMAGE, TEXT) for rows in (2, 16)]
        return [toy(TOY_IMAGE, 128, 64), toy(TOY_TEXT, 64, 40), *true]
    found = []
    for model in ("Janus-Pro-1B", "Janus-Pro-7B"):
        of = partial(case, model, torch.bfloat16, device, steps=16)
        early = [EARLY, BOTH] if has_dependent_launch(torch.device(device)) else []
        for stage, rows in ((IMAGE, 32), (TEXT, 16)):  # of a published step
            found += [of(stage, rows, variant=variant) for variant in ("", FUSED, *early)]
        found += [of(IMAGE, 2), of(IMAGE, 256), of(IMAGE, 256, variant=FP8), of(TEXT, 128)]
    return found


if __name__ == "__main__":
    raise SystemExit(main(__doc__, cases))
