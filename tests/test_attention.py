"""Every implementation of attention computes what each row alone would, and one that cannot run says why."""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import pairwise

import pytest
import torch
from oracle import CUDA, gpu
from test_sequences import close, gradients, streams
from tiny import tiny_policy
from torch import Tensor

from bicot.grpo.config import Config, RewardConfig
from bicot.model.attention import IMPLEMENTATIONS, Attention, available, resolve
from bicot.model.sequences import Block, collect, lay_out, sequence_attention

CPU = torch.device("cpu")
OTHERS = ["varlen", "flash_attn", "xformers"]
# ragged rows: a prompt of a group, a plan that two samples share, a row that begins another, and one token alone
ROWS = [[*range(40), 90, 91], [*range(40), 90, 92, 93], [*range(40)], [7], [*range(100, 230)], [*range(100, 230), 1, 2]]


def one_by_one(q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float | None) -> Tensor:
    """Each row by itself, in plain PyTorch and float64."""
    outputs = []
    for begin, end in pairwise(block.offsets.tolist()):
        rows = [x[begin:end].transpose(0, 1).double() for x in (q, k, v)]
        own, keys, values = (x.repeat_interleave(q.shape[1] // x.shape[0], dim=0) for x in rows)
        scores = own @ keys.transpose(1, 2) * (scale or q.shape[2] ** -0.5)
        hidden = torch.ones(end - begin, end - begin, dtype=torch.bool, device=q.device).triu(1)
        outputs.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outputs).to(q.dtype)


@pytest.fixture(autouse=True)
def oracle(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(IMPLEMENTATIONS, "one_by_one", one_by_one)
    yield


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("recompute", [False, "selective", True])
def test_packed_rows_equal_padded_rows(kv_heads: int, recompute: bool | str) -> None:
    """Two streams as one block, in float64: outputs and gradients equal those of padded batches through `sdpa`."""
    policy = tiny_policy(kv_heads=kv_heads)
    policy.model.double().requires_grad_(True)
    expected = policy.hidden(*streams(policy))
    wanted = gradients(policy, expected)
    policy.attention = Attention("one_by_one")
    policy.recompute(recompute)
    policy.model.train()
    found = policy.hidden(*streams(policy))
    assert [x.shape for x in found] == [x.shape for x in expected]
    close(found, expected)
    close(gradients(policy, found), wanted)


def through(name: str, qkv: Tensor, kv_heads: int, width: int, given: Tensor) -> list[Tensor]:
    """The attention of ROWS, and its gradient."""
    qkv = qkv.clone().requires_grad_(True)
    ids, _, layout = lay_out([ROWS[:4], ROWS[4:]], qkv.device, name)
    angles = torch.outer(layout.positions.double(), torch.linspace(1, 0.01, width // 2, device=qkv.device).double())
    cos, sin = (t.to(qkv.dtype) for t in (angles.cos(), angles.sin()))
    out = collect(layout, *sequence_attention(qkv[: len(ids)], cos, sin, kv_heads, None, layout))
    return [out.detach(), *torch.autograd.grad(out, qkv, given)]


def both(name: str, heads: int, kv_heads: int, width: int, dtype: torch.dtype, to: str) -> None:
    """Errors of an implementation, against float64, are those of `sdpa`."""
    draw, tokens = torch.Generator().manual_seed(width), len(lay_out([ROWS[:4], ROWS[4:]], CPU)[0])
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * width, generator=draw).to(to, dtype)
    given = torch.randn(tokens, heads * width, generator=draw).to(to, dtype)
    exact = through("one_by_one", qkv.double(), kv_heads, width, given.double())
    ours, sdpa, again = (through(each, qkv, kv_heads, width, given) for each in (name, "sdpa", name))
    for x, y, true, second in zip(ours, sdpa, exact, again, strict=True):
        error, theirs = ((each.double() - true).norm() / true.norm() for each in (x, y))
        assert error <= 1.5 * theirs + torch.finfo(dtype).eps / 4
        if name == "flash_attn":  # the others add up gradients of queries in any order
            assert torch.equal(x, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 2)])
def test_kernels_on_packed_rows(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    both("one_by_one", heads, kv_heads, 16, dtype, "cpu")


@gpu
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(16, 16, 128), (4, 4, 64), (8, 2, 128)])
def test_as_precise_as_sdpa(name: str, heads: int, kv_heads: int, width: int) -> None:
    if name not in available(torch.device("cuda"), torch.bfloat16):
        pytest.skip(f"{name} cannot run here")
    both(name, heads, kv_heads, width, torch.bfloat16, "cuda")


def test_an_implementation_that_cannot_run_says_why() -> None:
    """Without a package the line that installs it, and otherwise what the device or the dtype lacks."""
    install = {"flash_attn": "pip install flash-attn --no-build-isolation", "xformers": "pip install xformers"}
    for name in OTHERS:
        absent = name in install and not find_spec(name)
        why = f"is not installed.*: {install[name]}$" if absent else "needs an NVIDIA GPU .* not cpu: take sdpa$"
        with pytest.raises(ValueError, match=f"^attn_implementation={name} {why}"):
            resolve(name, CPU, torch.bfloat16)
        with pytest.raises(ValueError, match=f"attn_implementation={name} needs dtype=bfloat16, not float32"):
            Config(rewards=RewardConfig("scene"), dtype="float32", attn_implementation=name)
    if CUDA:
        with pytest.raises(ValueError, match=r"varlen needs dtype=bfloat16, not float32"):
            resolve("varlen", torch.device("cuda"), torch.float32)
    for name in ("sdpa", "auto"):
        assert resolve(name, CPU, torch.float32).name == name


def test_auto_measures_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It measures in the first pass; a reference model that shares the choice does not measure again."""
    sdpa, calls = IMPLEMENTATIONS["sdpa"], []

    def slow(q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float | None) -> Tensor:
        calls.append(len(q))
        time.sleep(0.01)
        return sdpa(q, k, v, block, scale)

    monkeypatch.setitem(IMPLEMENTATIONS, "sdpa", slow)
    policy, reference = tiny_policy(), tiny_policy().freeze()
    reference.attention = policy.attention = Attention("auto")
    with torch.no_grad():
        first = reference.hidden(*streams(policy))
    assert policy.attention.name == "one_by_one" and calls
    said = capsys.readouterr().err
    assert said.startswith("attn_implementation auto: one_by_one; a layer's attention in ms: sdpa ")
    calls.clear()
    close(policy.hidden(*streams(policy)), first)
    assert not calls and not capsys.readouterr().err


def test_auto_is_sdpa_where_nothing_else_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(IMPLEMENTATIONS, "one_by_one")
    policy = tiny_policy()
    policy.attention = Attention("auto")
    expected = tiny_policy().hidden(*streams(policy))
    assert all(map(torch.equal, policy.hidden(*streams(policy)), expected)) and policy.attention.name == "sdpa"
