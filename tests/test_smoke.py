"""Whether everything works on this machine, in under a minute: each kernel at true shapes and odd ones, the engine, the
scorers, one update. A CPU walks the same tests with small shapes and the C++ kernels.

On a GPU the minute is the compiler's: each shape, dtype and option here stands for a kernel that is not compiled yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from forced import FORMAT, PROMPTS, TOLERANCE, assert_same, engine_of, gap, greedy, rollout
from oracle import BFLOAT16_ROUNDING, CUDA, assert_no_worse, no_host_sync, poisoned_outputs
from stepping import G, config, double_policy, frozen_rollout, move, plain_step
from test_prefill_attention import packed
from test_rms_norm import inputs as norm_inputs
from test_rope_kv_write import CANARY
from test_rope_kv_write import tokens as rope_tokens
from test_silu_mul import inputs as gate_up_inputs
from tiny import tiny_policy
from tiny_git import make_git
from tiny_grounding import make_grounding
from tiny_hps import make_hps
from tiny_orm import make_orm
from torch import Tensor

from bicot.grpo.distributed import Ranks
from bicot.grpo.optim import MasterAdamW
from bicot.grpo.step import reference_logprobs, split, update
from bicot.kernels.cfg_sample import cfg_sample
from bicot.kernels.decode_attention import decode_attention
from bicot.kernels.dispatch import choose
from bicot.kernels.group_advantages import group_advantages
from bicot.kernels.grpo_loss import TokenStream, grpo_loss
from bicot.kernels.kv_pool import choose_for_pool, quantize_fp8
from bicot.kernels.linear_logprobs import linear_logprobs
from bicot.kernels.prefill_attention import prefill_attention
from bicot.kernels.rms_norm import rms_norm
from bicot.kernels.rope_kv_write import rope_kv_write
from bicot.kernels.silu_mul import silu_mul
from bicot.kernels.token_logprobs import token_logprobs
from bicot.model.chunk import RolloutChunk
from bicot.model.packed import Packed
from bicot.model.settings import Sampling
from bicot.rewards.base import Example, NumeracyInfo, SpatialInfo
from bicot.rewards.git_vqa import GitReward
from bicot.rewards.grounding import GroundingReward
from bicot.rewards.hps import HPSReward
from bicot.rewards.orm import OrmReward

DEVICE, F32, BF16 = torch.device("cuda" if CUDA else "cpu"), torch.float32, torch.bfloat16
# N, V, dtype, and whether the rows lie in a wider buffer
LOGITS = [(1024, 102400, BF16, False), (2048, 16384, BF16, False)] if CUDA else [(12, 4096, BF16, False)]
LOGITS += [(37, 7, BF16, True), (11, 16387, F32, True)]
# N, D, V
HEADS = [(256, 4096, 102400, BF16), (512, 2048, 16384, BF16)] if CUDA else [(40, 64, 1000, BF16)]
HEADS += [(9, 24, 13, F32)]
# R, Hq, Hkv, E, the keys of a prefix, and at most of a row's own
ATTENTION = (32, 16, 16, 128, 32, 576, BF16) if CUDA else (6, 4, 4, 32, 5, 70, BF16)
# (relative, absolute) beyond the error of the reference in the same dtype: sums in another order, and two roundings of
# a bfloat16 gradient
OUTPUT, GRADIENT = (1e-5, 1e-5), {F32: (4e-6, 1e-8), BF16: (2 * BFLOAT16_ROUNDING, 1e-8)}
# of a head: products of other shapes round some bfloat16 logits the other way
OF_HEAD = {F32: OUTPUT, BF16: (1e-4, 2e-4)}
ROUNDED = {F32: (2e-6, 1e-7), BF16: (2**-12, 1e-7)}  # every rounding is where the reference has it

Outputs = dict[str, Tensor]


def no_sync() -> Any:
    return no_host_sync() if CUDA else nullcontext()


def normal(*shape: int, std: float = 1.0, seed: int = 0) -> Tensor:
    return std * torch.randn(shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(seed))


def compare(
    run: Callable[..., Outputs],
    leaves: Sequence[Tensor],
    data: Sequence[Tensor | None],
    output: tuple[float, float] = OUTPUT,
) -> None:
    """`run(impl, *leaves, *data)` against the reference in the same dtype and in float64.

    Ours runs twice: the second run gives the same bits and waits for no device.
    """

    def once(impl: str, to: Callable[[Tensor], Tensor] = torch.Tensor.detach) -> Outputs:
        given = [None if x is None else to(x).clone() for x in (*leaves, *data)]
        return run(impl, *(x.requires_grad_() for x in given[: len(leaves)]), *given[len(leaves) :])

    gt, eager = once("torch", lambda x: x.double() if x.is_floating_point() else x), once("torch")
    with poisoned_outputs():
        ours = once("auto")
        with no_sync():
            again = once("auto")
    assert ours.keys() == eager.keys() == gt.keys()
    for name, value in ours.items():
        assert torch.equal(value, again[name]), f"{name}: other bits from the same input"
        relative, absolute = GRADIENT[leaves[0].dtype] if "gradient" in name else output
        if "head gradient" in name:  # a product of rounded gradients: what cancels in a small element was large
            absolute += relative * gt[name].abs().max().item()
        assert_no_worse(name, value, eager[name], gt[name], relative, absolute)


def holds(*conditions: Tensor) -> Tensor:
    """1.0 if all are true, without asking the device."""
    return torch.stack([condition.all() for condition in conditions]).all().float()


@pytest.mark.skipif(not CUDA, reason="a CPU may have no C++ kernels")
def test_auto_takes_the_kernels() -> None:
    assert all(choose("auto", DEVICE, dtype) == "triton" for dtype in (F32, BF16))
    fp8 = "triton" if torch.cuda.get_device_capability() >= (8, 9) else "torch"
    assert choose_for_pool("auto", DEVICE, BF16, fp8=True, native_fp8=False) == fp8


def rows_in(buffer: Tensor, V: int) -> Tensor:
    return buffer[:, 3 : 3 + V] if buffer.shape[1] > V else buffer


def logit_buffer(N: int, V: int, dtype: torch.dtype, strided: bool, seed: int = 0) -> Tensor:
    """Logits with NaN between the rows, where no kernel may read or write."""
    buffer = torch.full((N, V + 13 * strided), torch.nan, dtype=dtype, device=DEVICE)
    rows_in(buffer, V).copy_(normal(N, V, std=2, seed=seed))
    return buffer


def logit_gradients(buffer: Tensor, whole: Tensor, targets: Tensor, V: int, overwritten: bool) -> Outputs:
    """The gradient, apart at the targets: there it is so large that its rounding would hide errors of the others."""
    gradient, logits, at = rows_in(buffer.grad, V), rows_in(whole.detach(), V), targets[:, None]
    between = [whole[:, :3].isnan(), whole[:, 3 + V :].isnan()] if whole.shape[1] > V else []
    return {
        "gradient at the targets": gradient.gather(1, at),
        "gradient": gradient.masked_fill(torch.arange(V, device=DEVICE) == at, 0),
        "what is overwritten": holds(gradient == logits if overwritten else at == at, *between),
    }


def drawn_tokens(N: int, V: int) -> Tensor:
    """[N] int64, among them the first and the last of a vocabulary."""
    targets = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(0))
    targets[0], targets[1] = 0, V - 1
    return targets.to(DEVICE)


def weighed(logprob: Tensor, entropy: Tensor) -> Outputs:
    """Both outputs, after the backward pass of a loss in which each counts differently."""
    angles = torch.arange(len(logprob), device=DEVICE).to(logprob)
    (angles.cos() * logprob + angles.sin() * entropy).sum().backward()
    return {"logprob": logprob.detach(), "entropy": entropy.detach()}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("N", "V", "dtype", "strided"), LOGITS)
def test_token_logprobs(N: int, V: int, dtype: torch.dtype, strided: bool, inplace: bool) -> None:
    def run(impl: Any, buffer: Tensor, targets: Tensor) -> Outputs:
        whole, overwrite = buffer.clone(), inplace and impl != "torch"  # as the output of a head: a leaf has to stay
        options: Any = {"temperature": 0.7, "inplace_backward": overwrite, "impl": impl}
        outputs = weighed(*token_logprobs(rows_in(whole, V), targets, **options))
        return outputs | logit_gradients(buffer, whole, targets, V, overwrite)

    compare(run, [logit_buffer(N, V, dtype, strided)], [drawn_tokens(N, V)])


def head(N: int, D: int, V: int, dtype: torch.dtype) -> list[Tensor]:
    """hidden, weight and bias of logits that spread over a few units."""
    shapes = [((N, D), 1.0), ((V, D), 2 / math.sqrt(D)), ((V,), 0.5)]
    return [normal(*shape, std=std, seed=i).to(dtype) for i, (shape, std) in enumerate(shapes)]


def head_gradients(*leaves: Tensor) -> Outputs:
    return {f"head gradient {i}": leaf.grad for i, leaf in enumerate(leaves)}


@pytest.mark.parametrize(("N", "D", "V", "dtype"), HEADS)
def test_linear_logprobs(N: int, D: int, V: int, dtype: torch.dtype) -> None:
    def run(impl: Any, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Outputs:
        options: Any = {"bias": bias, "temperature": 0.7, "impl": impl}
        return weighed(*linear_logprobs(hidden, weight, targets, **options)) | head_gradients(hidden, weight, bias)

    compare(run, head(N, D, V, dtype), [drawn_tokens(N, V)], OF_HEAD[dtype])


def loss_terms(logits: Tensor) -> list[Tensor]:
    """Targets, advantages, old and reference log-probs. Ratios stay away from the bounds, where rounding decides."""
    N, V = logits.shape
    targets, ratios = drawn_tokens(N, V), torch.tensor([0.5, 0.95, 1.05, 1.8], device=DEVICE)
    logp = (logits.double() / 0.7).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    old, ref = logp - ratios.repeat(N)[:N].log(), logp + normal(N, std=0.5)
    return [targets, torch.linspace(-1, 1, 8, device=DEVICE), old.float(), ref.float()]


def loss_outputs(impl: Any, terms: Sequence[Tensor], inplace: bool = False, **source: Tensor) -> Outputs:
    """Loss, metrics and log-probs, after a backward pass of the sum over the tokens, of which the loss is the mean."""
    targets, advantages, old, ref = terms
    sample = torch.arange(len(targets), device=DEVICE) * len(advantages) // len(targets)
    stream = TokenStream(targets, sample, ref_logprob=ref, old_logprob=old, temperature=0.7, name="text", **source)
    result = grpo_loss([stream], advantages, beta=0.1, entropy_coef=0.1, inplace=inplace, impl=impl)
    (len(targets) * result.loss).backward()
    return {"loss": result.loss.detach(), "logprob": result.logprobs[0], **result.metrics}


@pytest.mark.parametrize(("N", "V", "dtype", "strided"), LOGITS)
def test_grpo_loss_in_place_of_logits(N: int, V: int, dtype: torch.dtype, strided: bool) -> None:
    def run(impl: Any, buffer: Tensor, *terms: Tensor) -> Outputs:
        whole, overwrite = buffer.clone(), impl != "torch"
        outputs = loss_outputs(impl, terms, overwrite, logits=rows_in(whole, V))
        return outputs | logit_gradients(buffer, whole, terms[0], V, overwrite)

    buffer = logit_buffer(N, V, dtype, strided)
    compare(run, [buffer], loss_terms(rows_in(buffer, V)))


@pytest.mark.parametrize(("N", "D", "V", "dtype"), HEADS)
def test_grpo_loss_of_hidden(N: int, D: int, V: int, dtype: torch.dtype) -> None:
    def run(impl: Any, hidden: Tensor, weight: Tensor, bias: Tensor, *terms: Tensor) -> Outputs:
        outputs = loss_outputs(impl, terms, hidden=hidden, weight=weight, bias=bias)
        del outputs["text/ratio_max"]  # of the one token whose logit is rounded worst
        return outputs | head_gradients(hidden, weight, bias)

    leaves = head(N, D, V, dtype)
    compare(run, leaves, loss_terms(torch.nn.functional.linear(*leaves)), OF_HEAD[dtype])


@pytest.mark.parametrize(
    ("P", "G", "scale", "combine"), [(8, 8, "group", "sum_then_normalize"), (3, 7, "batch", "normalize_then_sum")]
)
def test_group_advantages(P: int, G: int, scale: Any, combine: Any) -> None:
    def run(impl: Any, rewards: Tensor, weights: Tensor) -> Outputs:
        options: Any = {"scale": scale, "combine": combine, "impl": impl}
        return {"advantages": group_advantages(rewards[:, ::2], G, weights[::2], **options)}

    rewards = normal(P * G, 6)
    rewards[rewards > 1] = torch.nan  # missing
    compare(run, [], [rewards, torch.tensor([1.0, 9, 0.5, 9, 2, 9], device=DEVICE)], (0, 4e-6))


@pytest.mark.parametrize(
    ("B", "V", "dtype", "strided", "options"),
    [
        (32, 16384, BF16, False, {"guidance": 5.0}),
        (16, 102400, BF16, False, {"temperature": 0.8, "top_k": 50, "top_p": 0.9}),
        (33, 16387, F32, True, {"guidance": 3.0, "temperature": 1.3}),
        (9, 13, F32, True, {"guidance": 5.0, "temperature": 0.0}),
    ],
)
def test_cfg_sample(B: int, V: int, dtype: torch.dtype, strided: bool, options: dict[str, Any]) -> None:
    """The tokens that the reference draws on a CPU."""
    cond, uncond = (rows_in(logit_buffer(B, V, dtype, strided, seed), V) for seed in (0, 1))
    offset = torch.arange(B, device=DEVICE) * 977 + (3 << 32)
    cfg_sample(cond, uncond, **options, seed=4, offset=offset)  # compiles
    with no_sync():
        ours = cfg_sample(cond, uncond, **options, seed=4, offset=offset)
    expected = cfg_sample(cond.cpu(), uncond.cpu(), **options, seed=4, offset=offset.cpu(), impl="torch")
    assert torch.equal(ours.token.cpu(), expected.token)
    torch.testing.assert_close(tuple(x.cpu() for x in ours[1:]), expected[1:], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("R", "Hq", "Hkv", "E", "prefix", "own", "dtype", "fp8"),
    [(*ATTENTION, False), (*ATTENTION, True), (5, 6, 2, 20, 3, 261, F32, False)],
)
def test_decode_attention(
    R: int, Hq: int, Hkv: int, E: int, prefix: int, own: int, dtype: torch.dtype, fp8: bool
) -> None:
    """Rows of `own` keys down to 1; every second row sees the prefix too. Slots of no row hold NaN."""
    row = torch.arange(R, device=DEVICE)
    length = 1 + (own - 1) * (R - 1 - row) // (R - 1)
    end = prefix + 5 + (length + 1).cumsum(0)
    start = end - length
    slot = torch.arange(int(end[-1]) + 1, device=DEVICE)
    used = ((slot >= start[:, None]) & (slot < end[:, None])).any(0) | ((slot >= 3) & (slot < 3 + prefix))
    pools = [normal(len(slot), Hkv, E, seed=seed).to(dtype).where(used[:, None, None], torch.nan) for seed in (1, 2)]
    scales = [None, None]
    if fp8:
        pools, scales = zip(*map(quantize_fp8, pools), strict=True)

    def run(impl: Any, qkv: Tensor, *given: Tensor) -> Outputs:
        *arguments, key_scales, value_scales = given
        if fp8 and qkv.dtype == torch.float64:
            arguments[:2] = arguments[0] * key_scales[..., None], arguments[1] * value_scales[..., None]
            key_scales = value_scales = None
        options: Any = {"key_scales": key_scales, "value_scales": value_scales, "impl": impl}
        return {"out": decode_attention(qkv[:, :Hq], *arguments, **options)}

    rows = [torch.full_like(row, 3), prefix * (1 - row % 2), start, length]
    compare(run, [], [normal(R, Hq + 2 * Hkv, E, std=2).to(dtype), *pools, *rows, *scales])


@pytest.mark.parametrize(("Hq", "Hkv", "E", "dtype"), [(16, 16, 128, BF16), (6, 2, 20, F32)])
def test_prefill_attention(Hq: int, Hkv: int, E: int, dtype: torch.dtype) -> None:
    run = lambda impl, *given: {"out": prefill_attention(*given, impl=impl)}  # noqa: E731
    output = (2 * BFLOAT16_ROUNDING, 2e-3) if dtype == BF16 else OUTPUT
    compare(run, [], [x.to(DEVICE) for x in packed(Hq, Hkv, E, dtype)], output)


@pytest.mark.parametrize(
    ("N", "Hq", "Hkv", "E", "dtype", "fp8"),
    [(32, 16, 16, 128, BF16, False), (32, 16, 16, 128, BF16, True), (5, 6, 2, 12, F32, False)],
)
def test_rope_kv_write(N: int, Hq: int, Hkv: int, E: int, dtype: torch.dtype, fp8: bool) -> None:
    given = rope_tokens(N, Hq, Hkv, E, dtype, str(DEVICE), fp8=fp8, scale=3)
    free = given.untouched()

    def run(impl: Any, qkv: Tensor, *rest: Any) -> Outputs:
        *tables, slots, keys, values, key_scales, value_scales = rest
        exact = qkv.dtype == torch.float64  # keeps keys and values as they are
        scales = (None, None) if exact else (key_scales, value_scales)
        outputs = {"q": rope_kv_write(qkv, *tables, slots, keys, values, *scales, impl=impl)}
        for name, pool, scale in (("keys", keys, scales[0]), ("values", values, scales[1])):
            stored = pool if exact else pool.float()
            outputs[f"other {name}"] = holds(stored[free] == CANARY)
            outputs[name] = stored[slots] if scale is None else stored[slots] * scale[slots][..., None]
            if fp8:
                outputs[f"scales of {name}"] = stored[slots].abs().amax(-1) / 448 if exact else scale[slots]
        return outputs

    # of float8, conversions may differ in how they round
    compare(run, [], given.arguments(), (2**-9, 1e-6) if fp8 else ROUNDED[dtype])


@pytest.mark.parametrize(
    ("N", "D", "dtype", "added"), [(512, 2048, BF16, True), (32, 4096, BF16, True), (33, 13, F32, False)]
)
def test_rms_norm(N: int, D: int, dtype: torch.dtype, added: bool) -> None:
    def run(impl: Any, x: Tensor, weight: Tensor, residual: Tensor) -> Outputs:
        out = rms_norm(x, weight, 1e-6, residual if added else None, impl=impl)
        return {"out": out, "residual": residual}

    compare(run, [], norm_inputs(N, D, dtype, str(DEVICE)), ROUNDED[dtype])


@pytest.mark.parametrize(("N", "size", "dtype"), [(512, 5632, BF16), (33, 7, F32)])
def test_silu_mul(N: int, size: int, dtype: torch.dtype) -> None:
    run = lambda impl, gate_up: {"out": silu_mul(gate_up, impl=impl)}  # noqa: E731
    compare(run, [], [gate_up_inputs(N, size, dtype, str(DEVICE))], ROUNDED[dtype])


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """On the device, where convolutions are as exact as on a CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    policy = tiny_policy()
    policy.model.to(DEVICE)
    return policy


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_graphs_draw_what_eager_steps_draw(policy: Any, kv_dtype: str) -> None:
    """On a CPU, which has no graphs, small chunks draw what a large one draws."""
    sampling = Sampling(max_completion_length=40, cfg_weight=2.0)
    ways: Any = [{"cuda_graphs": True}, {"cuda_graphs": False}] if CUDA else [{"max_rows": 512}, {"max_rows": 5}]
    assert_same(*(rollout(policy, PROMPTS, 5, sampling, kv_dtype=kv_dtype, **way) for way in ways))


def test_a_rollout_is_what_transformers_computes(policy: Any) -> None:
    assert gap(moved(greedy(engine_of(policy)), "cpu"), tiny_policy()) < TOLERANCE


def test_the_image_loop_never_waits_for_the_device(policy: Any) -> None:
    engine, sampling, steps = engine_of(policy), Sampling(max_completion_length=10, cfg_weight=2.0), []
    first, run = next(engine.generate(PROMPTS, 4, sampling, seed=1)), engine.graphs.run  # compiles and captures

    def watched(key: Any, step: Callable[[], None], times: int = 1) -> None:
        steps.extend([key] * times)
        with no_sync():
            run(key, step, times)

    engine.graphs.run = watched
    second = next(engine.generate(PROMPTS, 4, sampling, seed=1))
    assert len(steps) > 15 and torch.equal(first.image_tokens, second.image_tokens)


def moved(chunk: RolloutChunk, to: str) -> RolloutChunk:
    """The same rollout on another device."""
    columns = {f.name: getattr(chunk, f.name) for f in fields(chunk)}
    for name, column in columns.items():
        if isinstance(column, (Packed, Tensor)):
            columns[name] = (
                Packed(column.values.to(to), column.offsets) if isinstance(column, Packed) else column.to(to)
            )
    return RolloutChunk(**columns)


EXAMPLES = [
    Example("a red cat", "object", ("cat", "dog")),
    Example("a red apple and a blue bench", "color", ("apple", "bench"), ("red apple", "blue bench")),
    Example("two cats", "numeracy", ("cat",), numeracy_info=(NumeracyInfo(2, "cat"),)),
    Example("a dog left of a cat", "spatial", ("dog", "cat"), spatial_info=SpatialInfo("dog", "cat", "left of")),
]
SCORERS: dict[str, Callable[[Path], Any]] = {
    "hps": lambda folder: HPSReward.from_pretrained(make_hps(folder), tokenizer=folder / "tokenizer"),
    "git": lambda folder: GitReward.from_pretrained(make_git(folder)),
    "grounding": lambda folder: GroundingReward.from_pretrained(make_grounding(folder)),
    "orm": lambda folder: OrmReward.from_pretrained(make_orm(folder), dtype="float32"),
}


@pytest.mark.parametrize("name", SCORERS)
def test_scorers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch on the device against each picture alone on the CPU."""
    if name == "git":
        pytest.importorskip("PIL")  # the image processor that writes its settings
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    images = torch.rand(len(EXAMPLES), 3, 96, 96, generator=torch.manual_seed(1))
    here, there = SCORERS[name](tmp_path), SCORERS[name](tmp_path)
    there.model.to(DEVICE)
    scores = there.score(images.to(DEVICE), EXAMPLES).cpu()
    alone = torch.cat([here.score(images[i : i + 1], EXAMPLES[i : i + 1]) for i in range(len(EXAMPLES))])
    torch.testing.assert_close(scores, alone, rtol=0, atol=5e-4, equal_nan=True)
    finite = scores[scores.isfinite()]
    assert finite.max() - finite.min() > 0.01, "the scores tell pictures apart"


def test_an_update_is_the_plain_one(policy: Any) -> None:
    """In float32 on the device, against formulas in float64 on the CPU, sample by sample."""
    cfg, reference, plain = config(), tiny_policy(), double_policy(0)
    reference.model.to(DEVICE)
    move(policy)
    plain.model.load_state_dict(policy.model.state_dict())
    samples = frozen_rollout(policy, cfg)
    rewards = torch.randn(len(samples), 2, generator=torch.Generator().manual_seed(2))
    expected = plain_step(plain, double_policy(0), moved(samples, "cpu"), rewards.double(), cfg)

    encoder, parts = policy.prompt_encoder(FORMAT), split(samples, cfg)
    advantages = group_advantages(rewards.to(DEVICE), G)
    ref = reference_logprobs(reference, parts, encoder, cfg)
    optimizer, ranks = MasterAdamW(policy.trainable_parameters(), cfg), Ranks(0, 1, DEVICE)
    metrics = update(policy, optimizer, parts, advantages, ref, encoder, cfg, ranks)
    assert len(parts) == 2 and metrics["grad_norm"] > cfg.max_grad_norm, "micro-batches and clipping take part"
    torch.testing.assert_close(advantages.cpu().double(), expected["advantages"], rtol=0, atol=1e-5)
    for key in ("loss", "kl", "grad_norm"):
        torch.testing.assert_close(metrics[key].cpu().double(), expected[key].double(), rtol=1e-4, atol=1e-5)
    for (name, ours), theirs in zip(policy.model.named_parameters(), plain.model.parameters(), strict=True):
        # the first step of AdamW is lr · g / |g|: rounding decides the sign of a g near 0
        clear = torch.zeros_like(theirs).bool() if theirs.grad is None else theirs.grad.abs() > 1e-6
        error = (ours.detach().cpu() - theirs.detach()).abs()
        assert error[clear].le(0.02 * cfg.learning_rate).all(), name
        assert error[~clear].le(2.01 * cfg.learning_rate * theirs.requires_grad).all(), name
        assert theirs.grad is None or clear.any(), name
