"""`from bicot import Policy`, and what its `generate` promises."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracle import gpu
from tiny import ROOT, TOY

import bicot
from bicot import Policy
from bicot.model.adapters import add_lora
from bicot.model.generation import Generation
from bicot.model.policy import PUBLISHED_FREEZE
from bicot.model.prompts import PromptFormat
from bicot.model.settings import RolloutSettings, Sampling

PROMPTS = ["a red circle left of a blue square", "two circles"]


@pytest.fixture(scope="module")
def toy() -> Policy:
    return Policy.from_pretrained(TOY, device="cpu")


def same(a: Generation, b: Generation) -> bool:
    return a.plan == b.plan and torch.equal(a.tokens, b.tokens) and a.image.tobytes() == b.image.tobytes()


def test_importing_bicot_imports_nothing_else() -> None:
    code = "import sys, bicot; print(len(bicot.__all__), *{'torch', 'numpy', 'transformers'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.split() == [str(len(bicot.__all__))]


def test_names_of_bicot() -> None:
    assert all(callable(getattr(bicot, name)) and name in dir(bicot) for name in bicot.__all__)
    with pytest.raises(AttributeError, match="module 'bicot' has no attribute 'polcy'"):
        _ = bicot.polcy
    for path in (p for layer in ("kernels", "model", "rewards", "grpo", "toy") for p in (ROOT / layer).glob("*.py")):
        code = re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL)
        upward = r"from (\.\.|bicot)( import|\.(train|generate|evaluate)\b)|import bicot\b"
        assert not re.search(upward, code), f"{path.name} imports a program, or all of bicot"


def test_a_picture_depends_on_its_own_seed_alone(toy: Policy) -> None:
    both = toy.generate(PROMPTS, n=3, seed=5)
    assert [(g.prompt, g.seed) for g in both] == [(p, 5 + k) for p in PROMPTS for k in range(3)]
    engine = toy.engine
    alone = toy.generate(PROMPTS[1], seed=7)[0]
    assert same(alone, both[5]) and not same(both[4], both[5]) and toy.engine is engine
    assert alone.image.size == (32, 32) and alone.tokens.shape == alone.image_logprobs.shape == (64,)
    assert len(alone.plan_tokens) == len(alone.plan_logprobs) > 0 and (alone.plan_logprobs <= 0).all()
    assert toy.tokenizer.decode(alone.plan_tokens, skip_special_tokens=True).strip() == alone.plan
    assert toy.generate([]) == []


def test_a_given_plan_draws_what_it_drew_when_it_was_sampled(toy: Policy) -> None:
    sampled = toy.generate(PROMPTS, n=2, seed=3)
    given = toy.generate(PROMPTS, seed=4, plan=[f" {sampled[1].plan}\n", sampled[3].plan])
    assert all(same(*pair) for pair in zip(given, sampled[1::2], strict=True))
    assert len(given[0].plan_tokens) == len(given[0].plan_logprobs) == 0
    assert not same(toy.generate(PROMPTS[0], seed=4, plan="two blue squares")[0], given[0])


@gpu
def test_a_given_plan_on_a_gpu() -> None:
    """Before any plan has been sampled, and after."""
    toy, fresh = (Policy.from_pretrained(TOY, dtype=torch.float32, device="cuda") for _ in range(2))
    sampled = toy.generate(PROMPTS, seed=3)
    for policy in (fresh, toy):
        given = policy.generate(PROMPTS, seed=3, plan=[one.plan for one in sampled])
        assert all(same(*pair) for pair in zip(given, sampled, strict=True))


def test_without_a_plan_the_prompt_stands_alone(toy: Policy) -> None:
    """Not as "{prompt}. ", which an empty plan would give."""
    chunk = next(toy.engine.generate(["two circles"] * 2, 1, toy.settings.sampling, 0, plans=[None, ""]))
    texts = [toy.tokenizer.decode(ids[1:-1]) for ids in chunk.image_prompts.tolist()]
    want = [toy.settings.prompts.image_text(*pair) for pair in (("two circles", None), ("two circles", ""))]
    assert [re.sub(r"\s", "", text) for text in texts] == [re.sub(r"\s", "", text) for text in want]
    assert "two circles\n\n" in want[0] and "two circles. \n\n" in want[1]
    assert chunk.plan_texts == ["", ""] and chunk.plans.tolist() == [[], []] and not chunk.truncated.any()
    picture = toy.generate("two circles", plan="off")[0]
    assert picture.plan == "" and torch.equal(picture.tokens, chunk.image_tokens[0])


def test_stream_yields_pictures_before_all_are_drawn(toy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many prompts take no more memory than few."""
    drawn, engine = [], toy.engine
    monkeypatch.setattr(engine, "max_rows", 4)
    monkeypatch.setattr(engine, "_draw", lambda *a: (drawn.append(len(a[0])), type(engine)._draw(engine, *a))[1])
    pictures = toy.stream(PROMPTS, 3, 0, "auto", toy.settings.sampling)
    next(pictures)
    assert drawn == [2]
    assert len(list(pictures)) == 5 and drawn == [2, 2, 2]


def test_a_prompt_without_room_for_its_picture_is_an_error_before_plans_are_written(
    toy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy.engine, "_write_plans", lambda *_: pytest.fail("plans were written"))
    with pytest.raises(ValueError, match="prompt too long: 2.. tokens and 65 to generate"):
        toy.generate(["a circle", "a " * 200])


def test_threads_take_turns(toy: Policy) -> None:
    """As those of a web server."""
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda prompt: toy.generate(prompt)[0], PROMPTS * 2))
    for prompt, picture in zip(PROMPTS * 2, together, strict=True):
        assert torch.equal(picture.tokens, toy.generate(prompt)[0].tokens)


def test_a_stream_goes_on_after_another_call(toy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy.engine, "max_rows", 2)
    sampling = replace(toy.settings.sampling, max_completion_length=3)
    expected = list(toy.stream(PROMPTS * 2, 1, 0, "auto", sampling))
    found = []
    for picture in toy.stream(PROMPTS * 2, 1, 0, "auto", sampling):
        found.append(picture)
        toy.generate("two red squares", max_completion_length=20)
    assert [picture.plan for picture in found] == [picture.plan for picture in expected]
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(found, expected, strict=True))


def test_inference_mode_leaves_a_policy_that_trains(policy: Policy) -> None:
    """It is the mode in which servers usually draw. Tensors made in it cannot be trained or written outside."""
    policy.__class__ = Policy
    sampling = {"max_completion_length": 4}
    with torch.inference_mode():
        inside = policy.generate("a circle", **sampling)[0]
        assert torch.is_inference_mode_enabled()
    assert torch.equal(policy.generate("a circle", **sampling)[0].tokens, inside.tokens)
    policy.hidden(([[0, 8, 9]], [[8, 9]]))[0].sum().backward()
    assert not any(p.is_inference() for p in policy.model.parameters())


def test_the_engine_follows_another_dtype(policy: Policy) -> None:
    policy.__class__ = Policy
    policy.generate("a circle", max_completion_length=2)
    policy.model.bfloat16()
    assert policy.generate("a circle", max_completion_length=2)[0].tokens.shape == (16,)


def test_sampling_is_that_of_the_checkpoint_unless_given(toy: Policy) -> None:
    greedy = {"temperature": 0, "image_temperature": 0}
    a, b = toy.generate("a circle", n=2, **greedy, cfg_weight=1.0)
    assert torch.equal(a.tokens, b.tokens) and a.plan == b.plan
    assert len(toy.generate("a circle", max_completion_length=2, top_k=None)[0].plan_tokens) == 2


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"n": 0}, "n=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be in"),
        ({"seed": 2**31}, "seed=2147483648 must be in"),
        ({"prompts": ["a", " "]}, "empty prompt"),
        ({"prompts": ["a", " "], "plan": "off"}, "empty prompt"),
        ({"prompts": ["a", "b"], "plan": ["c"]}, "plan has 1 texts for 2 prompts"),
        ({"plan": ["auto"]}, 'a list of plans cannot have "auto"'),
        ({"top_k": 2.0}, "top_k 2.0 must be a whole number"),
        ({"prompts": "a " * 4000, "plan": "off"}, "prompt too long"),
        ({"temperature": -1}, "temperature -1 must be a number that is at least 0"),
        ({"cfg_weight": float("nan")}, "cfg_weight nan must be finite"),
        ({"top_p": 0}, "top_p 0 must be above 0"),
        ({"guidance": 2}, "unexpected keyword argument 'guidance'"),
    ],
)
def test_bad_arguments_are_named(toy: Policy, given: dict[str, object], error: str) -> None:
    with pytest.raises((ValueError, TypeError), match=error):
        toy.generate(**{"prompts": "a circle", **given})  # type: ignore[arg-type]


def test_settings_are_loaded_with_a_checkpoint(policy: Policy, tmp_path: Path) -> None:
    """In Hugging Face layout, and LoRA adapters on one; test_convert.py does the same in DeepSeek's layout."""
    policy.save_pretrained(tmp_path / "model")
    settings = RolloutSettings(PromptFormat("janus", "", "plan {}"), Sampling(6, cfg_weight=2.0))
    settings.save(tmp_path / "model")
    assert load_and_draw(tmp_path / "model") == settings
    shorter = replace(settings, sampling=Sampling(4, cfg_weight=1.0))
    pytest.importorskip("peft")
    base = bicot.load_policy(tmp_path / "model", dtype=torch.float32)
    base.adapters = add_lora(base.model, 2, 4, 0.0, ["q_proj"], PUBLISHED_FREEZE)
    base.save_pretrained(tmp_path / "adapter")
    assert load_and_draw(tmp_path / "adapter") == settings, "its model's, if it has none of its own"
    shorter.save(tmp_path / "adapter")
    assert load_and_draw(tmp_path / "adapter") == shorter


def load_and_draw(folder: Path) -> RolloutSettings:
    policy = Policy.from_pretrained(folder, device="cpu")
    picture = policy.generate("a red circle")[0]
    assert len(picture.plan_tokens) <= policy.settings.sampling.max_completion_length
    return policy.settings
