"""Rows in one pass are rows computed one by one, and what they begin with in common is computed once."""

from __future__ import annotations

import copy
from collections import Counter
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import CUDA, Operators
from tiny import tiny_policy
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from bicot.model import body
from bicot.model.engine import RolloutEngine
from bicot.model.policy import Policy
from bicot.model.prompts import PromptFormat
from bicot.model.sequences import lay_out, take

CPU = torch.device("cpu")
GPU = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]
ROW = st.lists(st.integers(0, 2), min_size=1, max_size=6)
# two groups: their plans begin alike, one is the beginning of another, two are equal, and one prompt begins the other
PROMPTS = [[0, 8, 9, 10]] * 4 + [[0, 8, 9]] * 2
PLANS = [[20, 21, 22, 1], [20, 21, 30, 31, 32, 1], [20, 21, 30, 31, 32, 1], [40], [41, 1], [42, 43]]
IMAGE_PROMPTS = [[*p[:2], *c, 3] for p, c in zip(PROMPTS, PLANS, strict=True)]
TOKENS = torch.arange(6 * 16).view(6, 16) * 7 % 37


def streams(policy: Policy) -> list[Any]:
    return [(PROMPTS, PLANS), (IMAGE_PROMPTS, policy.image_ids(TOKENS.tolist()))]


def one_by_one(policy: Policy) -> list[Tensor]:
    """Each row alone through transformers' own norm and eager attention."""
    model, to = policy.model.model, policy.device
    norms = [module for module in model.modules() if isinstance(module, body.Norm)]
    for norm in norms:
        norm.__class__ = LlamaRMSNorm
    model.language_model.config._attn_implementation = "eager"
    text, image = [], []
    for prompt, plan in zip(PROMPTS, PLANS, strict=True):
        hidden = model.language_model(input_ids=torch.tensor([prompt + plan], device=to)).last_hidden_state[0]
        text.append(hidden[len(prompt) - 1 : -1])
    for prompt, tokens in zip(IMAGE_PROMPTS, TOKENS, strict=True):
        words = model.language_model.get_input_embeddings()(torch.tensor([prompt], device=to))
        embeds = torch.cat([words, policy.model.prepare_embeddings_for_image_generation(tokens[None].to(to))], dim=1)
        hidden = model.language_model(inputs_embeds=embeds).last_hidden_state[0]
        image.append(hidden[len(prompt) - 1 : -1])
    model.language_model.config._attn_implementation = "sdpa"
    body.install(model.language_model)
    assert all(type(norm) is body.Norm for norm in norms) and norms
    return [torch.cat(text), torch.cat(image)]


def gradients(policy: Policy, outputs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in outputs]
    parameters = list(policy.model.model.language_model.parameters())
    return list(torch.autograd.grad(outputs, parameters, weights, allow_unused=True))


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    """Up to float32, to which transformers' norm and eager softmax round; some gradients are 3e-5 of the scale."""
    scale = max(true.abs().max() for true in expected)
    for x, true in zip(found, expected, strict=True):
        assert (x - true).abs().max() <= 1e-6 * scale < 0.1 * true.abs().max()


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_outputs_and_gradients(kv_heads: int, checkpointing: bool) -> None:
    policy = tiny_policy(kv_heads=kv_heads, biased=True)
    policy.model.double().requires_grad_(True)
    expected = one_by_one(policy)
    if checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        policy.model.train()
    found = policy.hidden(*streams(policy))
    assert [x.shape for x in found] == [(21, 32), (96, 32)]
    close(found, expected)
    close(gradients(policy, found), gradients(policy, expected))
    with torch.no_grad():
        for stream, together in zip(streams(policy), found, strict=True):
            close(policy.hidden(stream), [together])


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_selective_recomputation_changes_no_bit_and_repeats_no_product(
    kv_heads: int, dtype: torch.dtype, joined: bool
) -> None:
    def train(what: bool | str) -> tuple[list[Tensor], Counter[str]]:
        policy = tiny_policy(kv_heads=kv_heads)
        policy.model.to(dtype)
        if joined:
            body.join(policy.decoder)
        policy.recompute(what)
        outputs = policy.hidden(*streams(policy))
        with Operators() as ran:
            return gradients(policy, outputs), launches(ran)

    (expected, once), (found, again) = train(False), train("selective")
    wanted = [(x, y) for x, y in zip(found, expected, strict=True) if x is not None or y is not None]
    assert wanted and all(torch.equal(x, y) for x, y in wanted)
    assert once["mm"] == again["mm"] > 0
    repeated = again - once
    # of two layers and two blocks
    assert repeated == {"bicot::rms_norm": 4, "bicot::silu_mul": 2, "bicot::rope_spread": 4, "index_select.out": 4}


def test_a_reference_model_computes_the_same_in_fewer_products() -> None:
    policy, reference = tiny_policy(), tiny_policy().freeze()
    close(reference.hidden(*streams(policy)), policy.hidden(*streams(policy)))
    assert not reference.trainable_parameters()
    weights = [layer.mlp.gate_proj.weight for layer in reference.decoder.layers]
    assert all(2 * weight.nbytes == weight.untyped_storage().nbytes() for weight in weights)


def test_each_common_beginning_is_computed_once() -> None:
    policy, seen = tiny_policy(), []
    policy.decoder.layers[0].mlp.down_proj.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    policy.hidden(*streams(policy))
    # what a completion ends with is no input: [8 9 10 20 21 22] [30 31 32] [] [] then [0 8 9], which the row above has
    text = {tuple((*p, *c[:-1])[: i + 1]) for p, c in zip(PROMPTS, PLANS, strict=True) for i in range(len(p + c) - 1)}
    image = {tuple(p[: i + 1]) for p in IMAGE_PROMPTS for i in range(len(p))}
    assert seen == [len(text) + len(image) + 6 * 15]


def test_an_empty_completion_has_no_states(policy: Policy) -> None:
    (hidden,) = policy.hidden(([[0, 8], [0, 8]], [[], [9, 1]]))
    assert torch.equal(hidden, policy.hidden(([[0, 8]], [[9, 1]]))[0])


def test_layout() -> None:
    ids, tables, layout = lay_out([[[5, 6, 7], [5, 6], [5, 8]], [[5], [9, 9]]], CPU)
    assert ids == [5, 6, 7, 8, 5, 9, 9], "what two streams have in common is computed twice"
    assert tables == [[[0, 1, 2], [0, 1], [0, 3]], [[4], [5, 6]]]
    assert layout.positions.tolist() == [0, 1, 2, 1, 0, 0, 1]
    first, second = layout.blocks
    assert (first.shape, first.tokens) == ((3, 3), slice(0, 4)) and (second.shape, second.tokens) == (
        (2, 2),
        slice(4, 7),
    )
    assert first.token_at.tolist() == [0, 1, 2, 0, 1, 0, 0, 3, 0] and second.token_at.tolist() == [0, 0, 1, 2]
    assert first.starts.tolist() == [0, 3, 5, 6, 7] and first.places.tolist() == [0, 3, 6, 1, 4, 2, 7]
    assert first.first.tolist() == [0, 1, 2, 7] and second.first.tolist() == second.places.tolist() == [0, 2, 3]


@given(st.lists(st.lists(ROW, min_size=1, max_size=6), min_size=1, max_size=3), st.booleans())
def test_any_layout(blocks: list[list[list[int]]], padded: bool) -> None:
    ids, tables, layout = lay_out(blocks, CPU, "sdpa" if padded else "varlen")
    assert [[[ids[i] for i in tokens] for tokens in table] for table in tables] == blocks
    rows = [tokens for table in tables for tokens in table]
    for tokens in rows:
        assert layout.positions[tokens].tolist() == list(range(len(tokens)))
    assert {i for tokens in rows for i in tokens} == set(range(len(ids))), "each token is in a row"
    for block, table in zip(layout.blocks, tables if padded else [rows], strict=True):
        S, L = block.shape
        assert (len(table), max(map(len, table))) == (S, L) and block.lengths == tuple(map(len, table))
        offsets = block.offsets.tolist()
        assert offsets == [0, *accumulate(block.lengths)] and block.offsets.dtype == torch.int32
        own = torch.arange(len(ids))[block.tokens]
        begins = range(0, S * L, L) if padded else offsets
        real = [begin + i for begin, tokens in zip(begins, table, strict=False) for i in range(len(tokens))]
        assert own[block.token_at[real]].tolist() == [i for tokens in table for i in tokens]
        assert len(block.token_at) == (S * L if padded else offsets[-1])
        assert sorted(block.places.tolist()) == real, "every place but pads"
        for i, (begin, end) in enumerate(pairwise(block.starts.tolist())):
            places = block.places[begin:end].tolist()
            assert (
                places == sorted(places) and places[0] == block.first[i] and set(block.token_at[places].tolist()) == {i}
            )
    beginnings = sum(len({tuple(row[: i + 1]) for row in block for i in range(len(row))}) for block in blocks)
    assert len(ids) >= beginnings == len(lay_out(list(map(sorted, blocks)), CPU)[0]), "sorted, each is there once"


def test_the_same_rows_twice_are_the_same_bits(policy: Policy) -> None:
    first, second = (policy.hidden(*streams(policy)) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, gradients(policy, first), gradients(policy, second)))


@pytest.mark.parametrize("to", ["cpu", pytest.param("cuda", marks=GPU)])
def test_gradients_of_shared_tokens_are_summed_in_float32(to: str) -> None:
    """Sums in bfloat16 would lose what is 2^-8 of the first."""
    at = [3, *[0] * 40, 2, 3, *[0] * 24]
    given = torch.randn(len(at), 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    given[1] *= 256
    x = torch.zeros(4, 48, dtype=torch.bfloat16, device=to, requires_grad=True)
    first, second = (torch.autograd.grad(take(x, torch.tensor(at)), x, given.to(to))[0].cpu() for _ in range(2))
    exact = torch.zeros(4, 48, dtype=torch.float64).index_add_(0, torch.tensor(at), given.double())
    in_order = torch.zeros(4, 48)
    for row, grad in zip(at, given.float(), strict=True):
        in_order[row] += grad
    assert torch.equal(first, second) and torch.equal(first, in_order.bfloat16())
    assert ((first - exact).abs() <= 2**-8 * exact.abs()).all()


def test_other_calls_of_the_model_go_through_sdpa(policy: Policy) -> None:
    """Padded batches with masks, and generation, go through transformers' SDPA."""
    assert "attn" not in policy.model.config.to_json_string()
    plain = copy.deepcopy(policy.model)
    plain.model.language_model.config._attn_implementation = "sdpa"
    ids = torch.tensor([[2, 0, 8, 9], [0, 8, 9, 10]])
    given = {"input_ids": ids, "attention_mask": (ids != 2).long()}
    assert torch.equal(policy.model(**given).logits, plain(**given).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "generation_mode": "text"}
    assert torch.equal(policy.model.generate(**given, **options), plain.generate(**given, **options))


FREE = "view empty detach split expand slice transpose permute unsqueeze squeeze alias as_strided select.int"


def launches(ran: Operators) -> Counter[str]:
    """The operators that would each be a launch or more on a GPU."""
    free = [name for name in ran.names if name == "t" or any(word in name for word in FREE.split())]
    return Counter({name: count for name, count in ran.names.items() if name not in free})


def test_launches_of_a_layer() -> None:
    """Forward and backward of two blocks of sequences: at most 40, where transformers takes 97."""
    counts = []
    for layers in (2, 3):
        policy = tiny_policy(layers=layers)
        body.join(policy.decoder)
        rows = streams(policy)
        with Operators() as ran:
            outputs = policy.hidden(*rows)
            (outputs[0].sum() + outputs[1].sum()).backward()
        counts.append(launches(ran))
    assert (counts[1] - counts[0]).total() <= 40
    assert not any("index_add" in name or "index_put" in name for name in counts[1]), "sums of bfloat16 in any order"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("to", ["cpu", pytest.param("cuda", marks=GPU)])
def test_no_less_precise_than_transformers(to: str, dtype: torch.dtype) -> None:
    """Hidden states and gradients, against float64, beside those of rows computed one by one."""
    policy = tiny_policy(layers=4)
    exact = copy.deepcopy(policy.model).double()
    policy.model.to(to, dtype).requires_grad_(True)
    for wide, narrow in zip(exact.parameters(), policy.model.parameters(), strict=True):
        wide.requires_grad_(True).data.copy_(narrow)
    RolloutEngine(policy, policy.prompt_encoder(PromptFormat()))
    reference = Policy(exact, policy.tokenizer)

    def errors(outputs: list[Tensor]) -> Tensor:
        found = [*outputs, *gradients(policy, outputs)]
        pairs = [(x.cpu().double(), true) for x, true in zip(found, truth, strict=True) if true is not None]
        return torch.stack([(x - true).norm() / true.norm() for x, true in pairs])

    outputs = reference.hidden(*streams(reference))
    truth = [*outputs, *gradients(reference, outputs)]
    ours, theirs = errors(policy.hidden(*streams(policy))), errors(one_by_one(policy))
    rounding = torch.finfo(torch.float32).eps  # of float32, whose sums are in another order
    assert ours.mean() <= 1.1 * theirs.mean() + rounding
    assert (ours <= 2 * theirs + max(2 * rounding, torch.finfo(dtype).eps / 4)).all()
