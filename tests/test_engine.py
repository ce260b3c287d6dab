"""The engine against transformers, and against itself in other batches, chunks and caches."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from forced import FORMAT, PROMPTS, TOLERANCE, assert_same, draw, engine_of, image_hidden, rollout, text_hidden
from oracle import gpu
from tiny import tiny_policy
from torch import Tensor
from transformers import DynamicCache

from bicot.model import decoder, stages
from bicot.model.chunk import RolloutChunk
from bicot.model.kv import KVPool
from bicot.model.policy import Policy
from bicot.model.settings import Sampling

MODELS = [
    {"kv_heads": 4},
    {"kv_heads": 2, "vocab": 67, "codes": 41},
    {"kv_heads": 1, "seed": 3, "biased": True},
    {"kv_heads": 4, "seed": 1, "tied": True},
]


@pytest.mark.parametrize("count", [1, 2, 33])
@pytest.mark.parametrize("options", MODELS)
def test_greedy_tokens_equal_transformers(options: dict[str, Any], count: int) -> None:
    policy = tiny_policy(**options)
    sampling = Sampling(max_completion_length=20, temperature=0, image_temperature=0, cfg_weight=3.0)
    prompts = [f"{PROMPTS[i % 3]} {'w4 ' * (i % 7)}w{i}" for i in range(count)]
    chunk = rollout(policy, prompts, 1, sampling)
    model, tokenizer = policy.model, policy.tokenizer
    model.generation_config.generation_kwargs = {"boi_token_id": tokenizer.boi_token_id}
    for s in range(0, count, 8):  # each alone, unpadded; 0, 8, 16, 24 and 32 are of all lengths
        prompt = torch.tensor([chunk.prompts.tolist()[s]])
        text = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False, eos_token_id=1,
            pad_token_id=2,
        )  # fmt: skip
        assert text[0, prompt.shape[1] :].tolist() == chunk.plans.tolist()[s]
        prompt = torch.tensor([chunk.image_prompts.tolist()[s]])
        image = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_mode="image",
            do_sample=False,
            guidance_scale=3.0,
            past_key_values=DynamicCache(),  # its own static cache fails in transformers 5.17
            bos_token_id=0,
            pad_token_id=2,
        )
        assert torch.equal(image[0], chunk.image_tokens[s])


@pytest.mark.parametrize("options", MODELS)
def test_recorded_logprobs_equal_teacher_forcing(options: dict[str, Any]) -> None:
    """Each sample alone, unpadded, through the whole transformers model, at the sampling temperatures."""
    policy = tiny_policy(**options)
    w = 2.5
    sampling = Sampling(max_completion_length=12, temperature=0.8, image_temperature=1.3, top_k=9, cfg_weight=w)
    chunk = rollout(policy, PROMPTS, 3, sampling)
    recorded = chunk.plan_logprobs.unpack()
    for s in range(len(chunk)):
        prompt, plan = chunk.prompts.tolist()[s], chunk.plans.tolist()[s]
        logits = policy.model(input_ids=torch.tensor([prompt + plan])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / 0.8).log_softmax(-1).gather(1, torch.tensor(plan)[:, None])[:, 0]
        torch.testing.assert_close(recorded[s], expected, atol=TOLERANCE, rtol=0)

        ids, tokens = chunk.image_prompts.tolist()[s], chunk.image_tokens[s]
        pads = [policy.tokenizer.bos_token_id] + [policy.tokenizer.pad_token_id] * (len(ids) - 2) + [ids[-1]]
        rows = policy.embed_text(torch.tensor([ids, pads]))
        embeds = torch.cat([rows, policy.embed_image(tokens).expand(2, -1, -1)], dim=1)
        hidden = policy.decoder(inputs_embeds=embeds)[0][:, len(ids) - 1 : -1]
        cond, uncond = policy.model.model.generation_head(hidden)
        for logits, got in ((cond, chunk.image_logprobs[s]), (uncond + w * (cond - uncond), chunk.guided_logprobs[s])):
            expected = (logits / 1.3).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
            torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)


def test_training_forward_equals_recorded_logprobs(policy: Policy) -> None:
    """The ragged, right-padded forward that training uses computes what sampling recorded."""
    chunk = rollout(policy, PROMPTS, 4, Sampling(max_completion_length=12, top_k=0, cfg_weight=2.0))
    hidden = text_hidden(policy, chunk.prompts.tolist(), chunk.plans.tolist())
    logp = (hidden @ policy.text_head.weight.T).log_softmax(-1).gather(1, chunk.plans.values[:, None])[:, 0]
    torch.testing.assert_close(logp, chunk.plan_logprobs.values, atol=TOLERANCE, rtol=0)
    features = image_hidden(policy, chunk.image_prompts.tolist(), chunk.image_tokens)
    logits = features @ policy.image_head.weight.T + policy.image_head.bias
    logp = logits.log_softmax(-1).gather(1, chunk.image_tokens.view(-1, 1)).view_as(chunk.image_logprobs)
    torch.testing.assert_close(logp, chunk.image_logprobs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("max_rows", [1, 5, 12, 13])
@pytest.mark.parametrize("cfg_weight", [1.0, 3.0])
def test_tokens_do_not_depend_on_the_chunk(policy: Policy, max_rows: int, cfg_weight: float) -> None:
    sampling = Sampling(max_completion_length=10, cfg_weight=cfg_weight)
    engine = engine_of(policy, max_rows=max_rows)
    parts = list(engine.generate(PROMPTS, 3, sampling, seed=11))
    assert max(map(len, parts)) == min(9, max(1, max_rows // (1 if cfg_weight == 1 else 2)))
    assert_same(RolloutChunk.cat(parts), rollout(policy, PROMPTS, 3, sampling))


def test_tokens_do_not_depend_on_the_other_samples(policy: Policy) -> None:
    sampling = Sampling(max_completion_length=10, cfg_weight=2.0)
    engine = engine_of(policy)
    whole = draw(engine, PROMPTS, 3, sampling)
    alone = draw(engine, PROMPTS[1:2], 3, sampling, first_sample=3)
    assert_same(alone, whole[3:6])
    again = draw(engine, PROMPTS, 3, sampling)
    assert_same(again, whole)  # the same buffers, used before


def test_little_kv_memory_makes_smaller_chunks(policy: Policy) -> None:
    sampling = Sampling(max_completion_length=10, cfg_weight=2.0)
    roomy = engine_of(policy)
    whole = list(roomy.generate(PROMPTS, 3, sampling, seed=11))
    assert len(whole) == 1
    for tokens in (90, 160, 400):
        tight = engine_of(policy, kv_bytes=tokens * roomy.pool.bytes_per_token)
        parts = list(tight.generate(PROMPTS, 3, sampling, seed=11))
        assert len(parts) > 1 and tight.pool.slots <= tokens
        assert_same(RolloutChunk.cat(parts), whole[0])


@pytest.mark.parametrize("options", MODELS)
def test_fused_linear_layers_change_nothing(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Six kernels a layer for as many sequences as they take, and cuBLAS for a model with biases."""
    policy, sampling = tiny_policy(**options), Sampling(max_completion_length=12, cfg_weight=2.0)
    calls = Counter[str]()
    for name in ("decode_linear", "decode_linear_add"):
        function = getattr(decoder, name)
        counted = lambda *a, f=function, **k: (calls.update([f.__name__]), f(*a, **k))[1]  # noqa: E731
        monkeypatch.setattr(decoder, name, counted)
    engine = engine_of(policy)
    engine.decoder.fused_linear = True
    fused = draw(engine, PROMPTS, 4, sampling)
    assert calls["decode_linear"] == calls["decode_linear_add"] and bool(calls) != options.get("biased", False)
    assert_same(fused, rollout(policy, PROMPTS, 4, sampling))


def test_releasing_the_kv_cache_changes_nothing(policy: Policy) -> None:
    sampling = Sampling(max_completion_length=10, cfg_weight=2.0)
    keeps, gives = (engine_of(policy, kv_release=release) for release in (False, True))
    for seed in (11, 12):  # the second rollout takes the memory again
        expected, found = (draw(e, PROMPTS, 3, sampling, seed) for e in (keeps, gives))
        assert_same(found, expected)
        assert keeps.pool.slots > gives.pool.slots == 0 and gives.pool.layer(0)[0].untyped_storage().nbytes() == 0


def test_a_prompt_that_the_cache_cannot_hold_is_named(policy: Policy) -> None:
    engine = engine_of(policy, kv_bytes=45 * engine_of(policy).pool.bytes_per_token)
    sampling = Sampling(max_completion_length=10, cfg_weight=2.0)
    with pytest.raises(ValueError, match=r"does not fit the KV cache: it needs \d+ tokens, 44 fit.* 'w1 w1"):
        next(engine.generate(["a", "w1 " * 40], 2, sampling, seed=0))
    with pytest.raises(ValueError, match="does not fit the KV cache.*lower max_completion_length"):
        next(engine.generate(["a red circle and a blue square"], 2, sampling, seed=0))  # its plan fits, the picture not


def test_padding_rows_of_a_bucket_change_nothing(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets have 16 rows, and finished plans are seen late, as on a GPU."""

    class LateLook:
        def __init__(self, device: torch.device, rows: int) -> None:
            self.asked: list[bool] = []

        def next(self, running: Tensor, step: int) -> list[bool] | None:
            if step % 3:
                return None
            seen, self.asked = self.asked, running.tolist()
            return seen or None

        def forget(self) -> None:
            self.asked = []

    sampling = Sampling(max_completion_length=40, cfg_weight=2.0)
    exact = rollout(policy, PROMPTS, 8, sampling)
    assert len(set(exact.plans.lengths.tolist())) > 5 and exact.plans.lengths.min() < 10, "plans end at many times"
    monkeypatch.setattr(stages.Stage, "bucket", lambda self, samples: -(-samples // 16) * 16)
    monkeypatch.setattr(stages, "_Look", LateLook)
    assert_same(rollout(policy, PROMPTS, 8, sampling), exact)


def test_longer_plans_do_not_move_the_kv_cache(policy: Policy) -> None:
    """The pool has room for the longest plan from the first step on, so captured graphs stay valid."""
    engine, sampling = engine_of(policy), Sampling(max_completion_length=40)
    next(engine.generate(PROMPTS, 1, sampling, seed=0))
    place, longest = engine.pool.layer(0)[0].data_ptr(), []
    for seed in range(1, 9):
        longest.append(int(next(engine.generate(PROMPTS, 1, sampling, seed)).image_prompts.lengths.sum()))
        assert engine.pool.layer(0)[0].data_ptr() == place
    assert max(longest) > longest[0], "plans grew"
    limited = KVPool(policy.config.text_config, torch.float32, torch.device("cpu"), 50 * engine.pool.bytes_per_token)
    assert limited.reserve(1000) and limited.capacity == 49
    limited.max_bytes *= 2  # type: ignore[operator]
    assert not limited.reserve(1125) and limited.reserve(1126), "memory is looked at once for a size and an eighth more"


def test_draws_follow_the_distribution_of_transformers() -> None:
    """Chi-square of the first plan token, and of the first image token after one and the same plan."""
    policy = tiny_policy(scale=100.0)
    encoder = policy.prompt_encoder(FORMAT)
    count, w = 6000, 5.0
    sampling = Sampling(max_completion_length=1, top_k=0, temperature=10.0, cfg_weight=w, image_temperature=0.9)
    engine = engine_of(policy, max_rows=512)
    tokens = draw(engine, PROMPTS[:1], count, sampling, seed=5)
    prompt = tokens.prompts.tolist()[0]
    logits = policy.model(input_ids=torch.tensor([prompt])).logits[0, -1]
    assert chi_square_p(tokens.plans.values, (logits / 10).softmax(-1)) > 1e-3
    ids = tokens.image_prompts.tolist()
    usual = Counter(map(tuple, ids)).most_common(1)[0][0]
    same = [s for s in range(count) if tuple(ids[s]) == usual]
    assert len(same) > 300
    rows = torch.tensor([ids[same[0]], encoder.unconditional_ids(len(ids[same[0]]))])
    cond, uncond = policy.model.model.generation_head(policy.decoder(inputs_embeds=policy.embed_text(rows))[0][:, -1])
    expected = ((uncond + w * (cond - uncond)) / 0.9).softmax(-1)
    assert chi_square_p(tokens.image_tokens[same, 0], expected) > 1e-3
    assert chi_square_p(tokens.image_tokens[same, 0], cond.softmax(-1)) < 1e-3, "the test can tell distributions apart"


def chi_square_p(drawn: Tensor, probabilities: Tensor) -> float:
    """The p-value of `drawn`; tokens expected fewer than five times are one."""
    counts = torch.bincount(drawn, minlength=len(probabilities)).double()
    expected = probabilities.detach().double() * len(drawn)
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]]).clamp(min=1e-9)
    statistic = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2).item()


def test_an_fp8_cache_stays_close(policy: Policy) -> None:
    """Log-probs of the tokens that it draws, against teacher forcing with exact keys and values."""
    sampling = Sampling(max_completion_length=12, cfg_weight=2.0)
    errors = {}
    for kv_dtype in ("auto", "fp8"):
        chunk = rollout(policy, PROMPTS, 4, sampling, kv_dtype=kv_dtype)
        features = image_hidden(policy, chunk.image_prompts.tolist(), chunk.image_tokens)
        logits = features @ policy.image_head.weight.T + policy.image_head.bias
        exact = logits.log_softmax(-1).gather(1, chunk.image_tokens.view(-1, 1)).view_as(chunk.image_logprobs)
        errors[kv_dtype] = (chunk.image_logprobs - exact).abs()
    assert errors["auto"].max() < TOLERANCE
    assert 1e-4 < errors["fp8"].mean() < 0.02 and errors["fp8"].max() < 0.2


def test_bfloat16_logprobs_are_near_those_of_training() -> None:
    """Cached bfloat16 decoding against the bfloat16 forward of transformers: as near as that is to float32."""
    policy, exact = tiny_policy(scale=4.0), tiny_policy(scale=4.0)
    policy.model.bfloat16()
    exact.model.load_state_dict(policy.model.state_dict())
    chunk = rollout(policy, PROMPTS, 8, Sampling(max_completion_length=12, cfg_weight=2.0))

    def forced(model: Policy) -> Tensor:
        features = image_hidden(model, chunk.image_prompts.tolist(), chunk.image_tokens)
        logits = torch.nn.functional.linear(features, model.image_head.weight, model.image_head.bias).float()
        return logits.log_softmax(-1).gather(1, chunk.image_tokens.view(-1, 1)).view_as(chunk.image_logprobs)

    truth = forced(exact)
    ours, theirs = ((logp - truth).abs().mean() for logp in (chunk.image_logprobs, forced(policy)))
    assert ours < 1.5 * theirs < 0.05


def test_long_prefills_are_taken_in_passes(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = Sampling(max_completion_length=10, cfg_weight=2.0)
    whole = rollout(policy, PROMPTS, 3, sampling)
    passes, once = [], decoder.Decoder._prefill
    monkeypatch.setattr(decoder, "PREFILL_TOKENS", 40)
    monkeypatch.setattr(decoder.Decoder, "_prefill", lambda self, *a: (passes.append(len(a[0])), once(self, *a)))
    assert_same(rollout(policy, PROMPTS, 3, sampling), whole)
    assert len(passes) > 4 and max(passes) > 1


def test_a_rotary_embedding_that_changes_with_the_length_is_named(policy: Policy) -> None:
    policy.decoder.rotary_emb.rope_type = "dynamic"
    with pytest.raises(ValueError, match="rope_type 'dynamic' changes with the length"):
        engine_of(policy)


@gpu
def test_a_kv_cache_that_does_not_fit_becomes_smaller(policy: Policy) -> None:
    policy.model.cuda()
    engine = engine_of(policy, kv_bytes=2**50, max_rows=2**20)
    torch.cuda.set_per_process_memory_fraction(0.05)  # other tests run beside this one
    try:
        assert engine.pool.reserve(2**40)  # more than any GPU has
        assert 0 < engine.pool.capacity < 2**40
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_kv_cache_is_allocated_again_after_memory_ran_out(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(policy)
    sampling = Sampling(max_completion_length=10, cfg_weight=1.0)
    expected = next(engine.generate(PROMPTS[:1], 2, sampling, 0))
    with monkeypatch.context() as patch:
        real = torch.empty

        def empty(*shape: Any, **options: Any) -> Tensor:
            if 0 not in shape:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return real(*shape, **options)

        patch.setattr("bicot.model.kv.torch.empty", empty)
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            next(engine.generate(PROMPTS, 40, sampling, 0))
    assert torch.equal(next(engine.generate(PROMPTS[:1], 2, sampling, 0)).image_tokens, expected.image_tokens)


def test_samples_differ_within_a_group_and_between_seeds(policy: Policy) -> None:
    engine = engine_of(policy)
    sampling = Sampling(max_completion_length=10, cfg_weight=1.0)
    first, second = (next(engine.generate(PROMPTS, 4, sampling, seed)) for seed in (1, 2))
    assert len({tuple(row) for row in first.image_tokens.tolist()}) == len(first)
    assert not torch.equal(first.image_tokens, second.image_tokens)


def test_chunk_shapes_and_contents(policy: Policy) -> None:
    chunk = rollout(policy, PROMPTS, 2, Sampling(max_completion_length=10, cfg_weight=1.0))
    assert chunk.image_tokens.shape == (6, 16) and chunk.images.shape == (6, 3, 8, 8)
    assert chunk.images.min() >= 0 and chunk.images.max() <= 1
    assert torch.equal(chunk.image_logprobs, chunk.guided_logprobs)
    for s, plan in enumerate(chunk.plans.tolist()):
        assert plan.count(1) == (0 if chunk.truncated[s] else 1), "only the first EOS belongs to a plan"
        assert len(plan) <= 10
        assert chunk.plan_texts[s] == policy.tokenizer.decode(plan, skip_special_tokens=True).strip()
    part = chunk[2:5]
    assert len(part) == 3 and torch.equal(part.image_tokens, chunk.image_tokens[2:5])
    assert part.plans.tolist() == chunk.plans.tolist()[2:5]


def test_empty_and_too_long_prompts_are_named(policy: Policy) -> None:
    engine = engine_of(policy)
    with pytest.raises(ValueError, match="empty prompt"):
        next(engine.generate(["a", "  "], 2, Sampling(max_completion_length=10), seed=0))
    with pytest.raises(ValueError, match=r"prompt too long: .* exceed the context of 128.*w9 w9"):
        next(engine.generate(["w9 " * 130], 2, Sampling(max_completion_length=10), seed=0))
    engine = engine_of(policy, max_context=40)
    with pytest.raises(ValueError, match=r"prompt too long: .* exceed the context of 40.*w9 w9"):
        next(engine.generate(["w9 " * 30], 2, Sampling(max_completion_length=10), seed=0))
