"""Loading, freezing, and the shape of what a policy gives."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from forced import engine_of, text_hidden
from safetensors.torch import load_file, save_file
from tiny import tiny_policy, tiny_tokenizer
from tokenizers import Tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast

from bicot.model.chunk import RolloutChunk
from bicot.model.engine import RolloutEngine
from bicot.model.packed import Packed
from bicot.model.policy import Policy, load_policy
from bicot.model.prompts import PromptFormat
from bicot.model.settings import Sampling


def test_round_trip_through_the_hugging_face_layout(policy: Policy, tmp_path: Path) -> None:
    policy.save_pretrained(tmp_path)
    loaded = load_policy(tmp_path, dtype=torch.float32)
    for (name, a), (_, b) in zip(policy.model.named_parameters(), loaded.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert loaded.tokenizer.boi_token_id == policy.tokenizer.boi_token_id
    trains = {n.split(".")[1] for n, p in loaded.model.named_parameters() if p.requires_grad}
    assert trains == {"language_model", "weight"}, "the language model and lm_head.weight, nothing else"


def test_one_thread_makes_the_first_call_of_cos_and_sin() -> None:
    """Several threads, which a large tensor has, get wrong numbers from some versions of MKL."""
    sizes: dict[str, list[int]] = {"cos": [], "sin": []}

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if (name := func.__name__.partition(".")[0]) in sizes:
                sizes[name].append(args[0].numel())
            return func(*args, **kwargs or {})

    with Noted():
        engine_of(tiny_policy(context=2048))
    for called in sizes.values():
        assert called[0] == 1 and max(called) > 2048


def test_freeze_prefix_that_matches_nothing(tmp_path: Path) -> None:
    tiny_policy().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="begins with 'vision'"):
        load_policy(tmp_path, freeze=["vision"])


@pytest.mark.parametrize(
    ("template", "plan", "image"),
    [
        ("t2i_r1", "S\n\nUser: do p\n\nAssistant:", "User: p. a plan\n\nAssistant:"),
        ("janus", "S\n\n<|User|>: do p\n\n<|Assistant|>:", "<|User|>: p. a plan\n\n<|Assistant|>:"),
    ],
)
def test_chat_templates(template: str, plan: str, image: str) -> None:
    texts = PromptFormat(template, "S", "do {}")  # type: ignore[arg-type]
    assert texts.plan_text("p") == plan
    assert texts.image_text("p", "a plan") == image


def test_braces_in_prompts_survive() -> None:
    assert "{x} {}" in PromptFormat("t2i_r1", "", "draw {}").plan_text("{x} {}")


def test_reasoning_prompt_needs_one_placeholder() -> None:
    with pytest.raises(ValueError, match="exactly once"):
        PromptFormat("t2i_r1", "", "draw it")


def test_unconditional_row_has_the_length_and_the_ends() -> None:
    encoder = tiny_policy().prompt_encoder(PromptFormat())
    ids = encoder.image_ids("a red circle", "two blue square", room=16)
    row = encoder.unconditional_ids(len(ids))
    assert len(row) == len(ids) and (row[0], row[-1]) == (ids[0], ids[-1]) == (0, 5)
    assert set(row[1:-1]) == {2}


def test_weights_that_are_missing_or_unknown_are_named(tmp_path: Path) -> None:
    """transformers would go on with random values in their place."""
    tiny_policy().save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    norm = "model.language_model.layers.1.input_layernorm.weight"
    for weights, message in (
        ({k: v for k, v in whole.items() if k != "lm_head.weight"}, "lacks 1 weights, such as lm_head.weight"),
        ({k: v for k, v in whole.items() if k != norm}, f"lacks 1 weights, such as {norm}"),
        (whole | {"model.extra.weight": torch.ones(2)}, "has 1 unknown weights, such as model.extra.weight"),
        (whole | {norm: torch.ones(2)}, f"has 1 weights of another shape, such as {norm}"),
    ):
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            load_policy(tmp_path, dtype=torch.float32)
    save_file(whole, tmp_path / "model.safetensors", {"format": "pt"})
    load_policy(tmp_path, dtype=torch.float32)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    policy = tiny_policy(vocab=61)
    policy.save_pretrained(tmp_path)
    policy.tokenizer.add_tokens(["another"])
    policy.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # refused before the weights are read
    with pytest.raises(ValueError, match=r"the tokenizer has ids up to 61, but the model has 61 embeddings"):
        load_policy(tmp_path)


@pytest.mark.parametrize("tokens", [15, 64])
def test_pictures_that_the_vq_model_cannot_decode_are_refused(policy: Policy, tokens: int, tmp_path: Path) -> None:
    policy.config.vision_config.num_image_tokens = tokens
    policy.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"num_image_tokens is {tokens}, .* a grid of 4 x 4 = 16 image tokens"):
        load_policy(tmp_path)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("ids", [range(40), [*range(40), 59]])
def test_ids_that_the_tokenizer_does_not_have_are_not_drawn(temperature: float, ids: Sequence[int]) -> None:
    """Neither padded rows nor gaps; the recorded log-probs are those that training computes, over all rows."""
    tokenizer = tiny_tokenizer(40)
    if 59 in ids:
        tokenizer = with_token_at(tokenizer, 59)
    policy = Policy(tiny_policy(vocab=61).model, tokenizer)
    assert policy.unknown_ids == sorted({*range(61)} - {*ids})
    assert tiny_policy(vocab=61).unknown_ids == []
    with torch.no_grad():  # as likely as can be
        policy.model.lm_head.weight[policy.unknown_ids] *= 3
        policy.model.lm_head.weight[1] = 0  # no EOS
    engine = RolloutEngine(policy, policy.prompt_encoder(PromptFormat("t2i_r1", "", "plan {}")))
    sampling = Sampling(max_completion_length=20, temperature=temperature, top_k=0, cfg_weight=1.0)
    chunk = RolloutChunk.cat(list(engine.generate(["a red circle", "two blue square"], 8, sampling, seed=0)))
    assert set(chunk.plans.values.tolist()) <= {*ids}
    with torch.no_grad():
        hidden = text_hidden(policy, chunk.prompts.tolist(), chunk.plans.tolist())
        logits = hidden @ policy.text_head.weight.T
    mass = logits.softmax(-1)[:, policy.unknown_ids].sum(-1)
    assert mass.max() > 0.5, "the model would have drawn them"
    logp = logits.log_softmax(-1).gather(1, chunk.plans.values[:, None])[:, 0]
    torch.testing.assert_close(logp, chunk.plan_logprobs.values, atol=1e-4, rtol=0)


def with_token_at(tokenizer: PreTrainedTokenizerFast, place: int) -> PreTrainedTokenizerFast:
    """The tokenizer with a word far behind its others."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core["model"]["vocab"]["far"] = place
    names = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    more = {name: getattr(tokenizer, name) for name in ("image_token", "boi_token", "eoi_token")}
    backend = Tokenizer.from_str(json.dumps(core))
    return PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=more, **names)


def test_packed_rows() -> None:
    packed = Packed.of([[1, 2, 3], [], [4]])
    assert packed.tolist() == [[1, 2, 3], [], [4]] and len(packed) == 3
    assert packed[1:3].tolist() == [[], [4]] and packed[3:].tolist() == []
    assert Packed.cat([packed, packed[:1]]).tolist() == [[1, 2, 3], [], [4], [1, 2, 3]]
