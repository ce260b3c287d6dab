"""The machine code of the kernels, compiled ahead of time; and the helper that reads it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from aot import ARCHITECTURES, TARGETS, Compiled, assert_clean, compile_kernel, needs_compiler

from bicot.kernels import adamw, cfg_sample_triton, fused_grpo, group_advantages, token_logprobs
from bicot.kernels.dispatch import tl, triton

pytestmark = needs_compiler


@triton.jit
def _center(p_x, p_y, N, B: tl.constexpr):  # type: ignore[no-untyped-def]
    o = tl.arange(0, B)
    m = o < N
    b_x = tl.load(p_x + o, m, other=0).to(tl.float32)
    tl.store(p_y + o, b_x - tl.sum(b_x, 0) / N, m)


def _compile(
    arch: int, divisible: tuple[str, ...] = ("p_x", "p_y", "N"), B: int = 4096, num_warps: int = 4
) -> Compiled:
    signature = {"p_x": "*bf16", "p_y": "*bf16", "N": "i32"}
    return compile_kernel(_center, signature, {"B": B}, divisible=divisible, num_warps=num_warps, arch=arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
class TestHelper:
    def test_passes_clean_code(self, arch: int) -> None:
        code = _compile(arch)
        assert_clean(code)
        assert code.load_widths == code.store_widths == {16}
        assert 16 < code.registers < 128 and code.shared > 0 and f".target sm_{arch}" in code.ptx

    def test_sees_narrow_accesses(self, arch: int) -> None:
        assert _compile(arch, ("p_x", "p_y")).load_widths == {2}  # N may end within a vector
        assert _compile(arch, ("p_x", "N")).store_widths == {2}

    def test_sees_a_spill(self, arch: int) -> None:
        spilling = _compile(arch, B=16384, num_warps=1)  # 512 values a thread, which has 255 registers
        assert spilling.stack > 0 and spilling.count("LDL") > 0
        with pytest.raises(AssertionError, match="bytes of stack"):
            assert_clean(spilling)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("scale", "normalize"), [("group", False), ("batch", False), ("batch", True)])
@pytest.mark.parametrize(("P", "G", "R"), [(16, 8, 3), (2, 1024, 2)])
def test_group_advantages(P: int, G: int, R: int, scale: str, normalize: bool, arch: int) -> None:
    pointers = dict.fromkeys(("p_rewards", "p_weights", "p_advantages"), "*fp32")
    launch = group_advantages.launch_config(P, G, R)
    options = {name: launch.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    code = compile_kernel(
        group_advantages._group_advantages_kernel,
        pointers | {"P": "i32", "eps": "fp32"},
        {"G": G, "R": R, "SCALE": scale, "NORMALIZE": normalize, **launch},
        divisible=pointers.keys() - {"p_rewards"},
        arch=arch,
        **options,
    )
    assert_clean(code)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("own", [False, True])
def test_adamw(own: bool, arch: int) -> None:
    """Without shared memory, which a change of layout between float32 and bfloat16 would take."""
    kernel, launch = adamw._adamw_kernel, dict(adamw._CONFIG)
    types = {"p_grad": "*fp32" if own else "*bf16", "p_weight": "*bf16", "size": "i32"}
    signature = {name: types.get(name, "*fp32" if name[:2] == "p_" else "fp32") for name in kernel.arg_names[:-1]}
    constants = {"BLOCK": launch.pop("BLOCK")} | ({"p_weight": None} if own else {})
    signature = {name: kind for name, kind in signature.items() if name not in constants}
    divisible = {name for name in signature if name[:2] == "p_"} | {"size"}
    code = compile_kernel(kernel, signature, constants, divisible=divisible, arch=arch, **launch)
    assert_clean(code)
    assert 16 in code.load_widths & code.store_widths and not code.shared


INTEGERS = ("V", "stride", "grad_stride", "results_stride")
FLAGS = ("CORRECT_KL", "HAS_OLD", "HAS_SAMPLING", "HAS_WEIGHT", "GRADIENT")
LOGITS_KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "token_logprobs": (token_logprobs._forward_kernel, {}),
    "token_logprobs_backward": (token_logprobs._backward_kernel, {}),
    "fused_grpo": (fused_grpo._grpo_kernel, dict.fromkeys(FLAGS, True) | {"CISPO": False, "KL": 3}),
}


def compile_logits_kernel(name: str, V: int, dtype: torch.dtype, arch: int) -> Compiled:
    kernel, constants = LOGITS_KERNELS[name]
    config = token_logprobs.row_config(torch.empty(2, V, dtype=dtype))
    options = {option: config.pop(option) for option in ("num_warps", "enable_fp_fusion")}
    constants = constants | config
    types = dict.fromkeys(("p_logits", "p_grad"), {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype])
    types |= {"p_targets": "*i64", "p_sample": "*i64", "p_lse": "*fp64"} | dict.fromkeys(INTEGERS, "i32")
    types |= dict.fromkeys(("inv_temperature", "beta", "low", "high", "delta", "clip_max"), "fp32")
    signature = {n: types.get(n, "*fp32") for n in kernel.arg_names if n not in constants}
    unknown = {p.name for p in kernel.params if p.do_not_specialize}
    divisible = {n for n in signature if n.startswith("p_") or (V % 16 == 0 and n in INTEGERS)} - unknown
    return compile_kernel(kernel, signature, constants, divisible=divisible, arch=arch, **options)


@pytest.mark.parametrize(("dtype", "arch"), TARGETS)
@pytest.mark.parametrize("V", [16384, 16385])  # 102400 gives the code of 16384: the compiler knows only V % 16 == 0
@pytest.mark.parametrize("name", LOGITS_KERNELS)
def test_logits_are_read_16_bytes_at_a_time(name: str, V: int, dtype: torch.dtype, arch: int) -> None:
    code = compile_logits_kernel(name, V, dtype, arch)
    config = token_logprobs.row_config(torch.empty(2, V, dtype=dtype))
    assert_clean(code)
    # as many as a thread needs for a block
    assert code.accesses("LDG", 16) >= config["BLOCK"] * dtype.itemsize // 16 // (32 * config["num_warps"])
    # 2 bytes at a time: the target's logit, and the rim
    assert code.accesses("LDG", 2) <= (1 if V % 16 == 0 else 3)
    assert code.accesses("STG", 2) <= (0 if V % 16 == 0 else 2)
    assert name == "token_logprobs" or 16 in code.store_widths


def compile_sampling(name: str, element: str, arch: int, **constants: bool) -> Compiled:
    kernel = getattr(cfg_sample_triton, name)
    options = {"num_warps": 8, "maxnreg": 168} if name == "truncate_kernel" else {"num_warps": 2}
    block = cfg_sample_triton.TRUNCATE_BLOCK if name == "truncate_kernel" else cfg_sample_triton.BLOCK
    types = {"p_cond": element, "p_uncond": element, "p_good": "*u8", "top_k": "i32", "top_p_bits": "i64"}
    types |= dict.fromkeys(("p_seed", "p_offset", "p_token", "p_first", "p_arrived", "p_last"), "*i64")
    types |= dict.fromkeys(("p_cut", "p_parts", "p_max", "p_logp_cond", "p_logp_guided"), "*fp32")
    types |= dict.fromkeys(("V", "parts", "cond_stride", "uncond_stride"), "i32")
    types["p_group"] = "*i32"
    signature = {n: types.get(n, "fp32") for n in kernel.arg_names if n not in constants and n != "BLOCK"}
    divisible = {n for n in signature if n.startswith("p_")} | {"V", "cond_stride", "uncond_stride"}
    return compile_kernel(
        kernel, signature, constants | {"BLOCK": block}, divisible=divisible, arch=arch, enable_fp_fusion=False,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("guided", "element", "arch"),
    [(False, "*bf16", 90), (True, "*bf16", 90), (False, "*fp32", 90), (True, "*fp32", 90), (True, "*bf16", 80)],
)
def test_cfg_sample(guided: bool, element: str, arch: int) -> None:
    """16 bytes at a time; no fused multiply-add, because the draw depends on every rounding."""
    logits = (1 + guided) * cfg_sample_triton.BLOCK * (2 if element == "*bf16" else 4)
    kernels = {"measure_kernel": {}, "truncate_kernel": {"TOP_K": True, "TOP_P": True}}
    racing = [{"GREEDY": False, "TRUNCATED": False}, {"GREEDY": False, "TRUNCATED": True}]
    racing += [{"GREEDY": True, "TRUNCATED": False}]
    for name, constants in [*kernels.items(), *(("race_kernel", options) for options in racing)]:
        code = compile_sampling(name, element, arch, GUIDED=guided, **constants)
        assert_clean(code)
        assert 16 in code.load_widths and "fma.rn.f32" not in code.ptx
        if name != "truncate_kernel":
            assert code.accesses("LDG", 16) >= logits // 16 // 64  # of each thread


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("V", [7, 16384, 16385])
def test_no_warp_writes_gradients_before_all_have_read_the_row(V: int, arch: int) -> None:
    """In place, it would overwrite the target's logit, or a short row that every warp reads whole."""
    code = compile_logits_kernel("fused_grpo", V, torch.bfloat16, arch)
    reading, _ = code.ptx.split("st.global", 1)  # the first store is that of the loss, after all statistics
    assert "bar.sync" in reading and "ld.global" not in reading[reading.rindex("bar.sync") :]
