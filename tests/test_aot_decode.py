"""The machine code of the kernels between a layer's products, in decoding and in training, compiled ahead of time."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from aot import ARCHITECTURES, TARGETS, Compiled, assert_clean, compile_kernel, needs_compiler

from bicot.kernels import (
    cfg_sample_triton,
    decode_attention,
    decode_linear,
    packed_rope,
    prefill_attention,
    record_draw,
    rms_norm,
    rope_kv_write,
    silu_mul,
)
from bicot.kernels.kv_pool import FP8

pytestmark = needs_compiler

TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
INDICES = ("p_token_at", "p_starts", "p_places")
POINTERS = dict.fromkeys(INDICES, "*i64") | {
    "p_dweight": "*fp32",
    "p_positions": "*i64",
    "p_slots": "*i64",
    "p_key_scales": "*fp32",
    "p_value_scales": "*fp32",
}


def test_dependent_launches_wait_before_the_first_access() -> None:
    """The kernels of a captured step: without PDL, and for a GPU that lacks it, the instruction is not there."""
    config, constants = rms_norm.launch_config(2048), {"D": 2048, "HAS_RESIDUAL": True}
    for arch, pdl in ((90, True), (90, False), (80, False)):
        code = compiled(rms_norm._rms_norm_kernel, "*bf16", config, constants | {"PDL": pdl}, arch)
        assert ("griddepcontrol.wait" in code.ptx) == pdl
    kernels = [
        *(rms_norm._rms_norm_kernel, silu_mul._silu_mul_kernel, rope_kv_write._rope_kv_write_kernel),
        *(decode_attention._attend_kernel, decode_attention._combine_kernel, record_draw._record_draw_kernel),
        *(cfg_sample_triton.measure_kernel, cfg_sample_triton.truncate_kernel, cfg_sample_triton.race_kernel),
    ]
    for kernel in kernels:
        body = ast.parse(kernel.src).body[0].body  # type: ignore[attr-defined]
        first = body[1] if isinstance(body[0], ast.Expr) else body[0]  # behind a docstring
        assert ast.unparse(first) == "if PDL:\n    tl.extra.cuda.gdc_wait()", kernel.__name__


def compiled(kernel: Any, element: str, config: dict[str, Any], constants: dict[str, Any], arch: int) -> Compiled:
    """Every argument that is no constant is a pointer that torch allocated, but for eps and indices of training."""
    options = {name: config[name] for name in ("num_warps", "enable_fp_fusion")}
    constants = {name: value for name, value in config.items() if name not in options} | constants
    types = POINTERS | {"eps": "fp32", "size": "i64"}
    signature = {name: types.get(name, element) for name in kernel.arg_names if name not in constants}
    if constants.get("FP8"):
        signature |= dict.fromkeys(("p_keys", "p_values"), "*fp8e4nv")
    divisible = signature.keys() - {"eps", *INDICES}
    return compile_kernel(kernel, signature, constants, divisible=divisible, arch=arch, **options)


def _cases() -> Iterator[Any]:
    """Kernels whose accesses to activations are all of 16 bytes."""
    for D in (1000, 2048, 4096):
        norm, config = rms_norm._rms_norm_kernel, rms_norm.launch_config(D)
        yield pytest.param(norm, config, {"D": D, "HAS_RESIDUAL": True}, id=f"rms_norm {D} residual")
        absent = {"p_residual": None, "p_total": None}
        yield pytest.param(norm, config, {"D": D, "HAS_RESIDUAL": False, **absent}, id=f"rms_norm {D}")
    for D in (1000, 4096):
        for trains in (False, True):
            constants = {"D": D, "HAS_DTOTAL": True, "HAS_DWEIGHT": trains} | ({} if trains else {"p_dweight": None})
            name = f"rms_norm backward {D} {'trained' if trains else 'frozen'}"
            yield pytest.param(rms_norm._backward_kernel, rms_norm.launch_config(D), constants, id=name)
    for size in (5632, 11008):
        for kernel in (silu_mul._silu_mul_kernel, silu_mul._backward_kernel):
            yield pytest.param(kernel, silu_mul._CONFIG, {"SIZE": size}, id=f"{kernel.__name__} {size}")


@pytest.mark.parametrize(("dtype", "arch"), TARGETS)
@pytest.mark.parametrize(("kernel", "config", "constants"), _cases())
def test_16_bytes_at_a_time(kernel: Any, config: dict, constants: dict, dtype: torch.dtype, arch: int) -> None:
    code = compiled(kernel, TYPES[dtype], config, constants, arch)
    assert_clean(code)
    assert code.load_widths == code.store_widths == {16}


@pytest.mark.parametrize(("dtype", "arch"), TARGETS)
@pytest.mark.parametrize("op", ["spread", "gather", "write", "write float8"])
@pytest.mark.parametrize(("Hq", "Hkv", "E"), [(16, 16, 128), (32, 8, 80)])
def test_rotary_embedding(Hq: int, Hkv: int, E: int, op: str, dtype: torch.dtype, arch: int) -> None:
    fp8 = op == "write float8"
    if fp8 and arch < 89:
        pytest.skip("it has no float8")
    constants = {"HQ": Hq, "HKV": Hkv, "HALF": E // 2}
    kernel = packed_rope._gather_kernel if op == "gather" else packed_rope._spread_kernel
    if op.startswith("write"):
        kernel, constants["FP8"] = rope_kv_write._rope_kv_write_kernel, fp8
        constants |= {} if fp8 else {"p_key_scales": None, "p_value_scales": None}
    code = compiled(kernel, TYPES[dtype], rope_kv_write.launch_config(E // 2), constants, arch)
    assert_clean(code)
    # 8 bytes: an index. Scales are 4 bytes; 16 or 32 bytes of activations become 8 of float8
    assert code.load_widths <= {8, 16} and code.store_widths == ({4, 8, 16} if fp8 else {16})
    assert code.shared == 0
    assert ("cvt.rn.satfinite.e4m3x2.f32" in code.ptx) == fp8  # rounded to nearest


def compile_attend(dtype: torch.dtype, Hkv: int, G: int, E: int, split: bool, arch: int) -> Compiled:
    config = decode_attention.launch_config(G, E)
    options = {name: config.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    constants = {"HKV": Hkv, "G": G, "E": E, "SPLIT": split, **config}
    element = "*fp8e4nv" if dtype == FP8 else TYPES[dtype]
    activation = "*bf16" if dtype == FP8 else TYPES[dtype]
    types = {"p_q": activation, "p_keys": element, "p_values": element, "p_top": "*fp32", "p_sum": "*fp32"}
    types |= {"p_out": "*fp32" if split else activation}
    types |= dict.fromkeys(("p_prefix_start", "p_prefix_length", "p_start", "p_length"), "*i64")
    scales = ("p_key_scales", "p_value_scales")
    if dtype == FP8:
        types |= dict.fromkeys(scales, "*fp32")
    else:
        constants |= dict.fromkeys(scales)
    return compile_kernel(
        decode_attention._attend_kernel,
        types | {"q_stride": "i32", "scale": "fp32"},
        constants,
        divisible=[*types, "q_stride"],
        arch=arch,
        **options,
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    ("dtype", "Hkv", "G", "E"),
    [
        (torch.bfloat16, 16, 1, 128),
        (torch.float32, 16, 1, 128),
        (FP8, 16, 1, 128),
        (torch.bfloat16, 4, 1, 32),
        (torch.bfloat16, 8, 4, 128),
        (torch.bfloat16, 2, 16, 256),
    ],
)
def test_decode_attention(dtype: torch.dtype, Hkv: int, G: int, E: int, split: bool, arch: int) -> None:
    """16 bytes of keys and values at a time."""
    if dtype == FP8 and arch < 89:
        pytest.skip("converts no float8")
    code = compile_attend(dtype, Hkv, G, E, split, arch)
    assert_clean(code)
    config = decode_attention.launch_config(G, E)
    vectors = 2 * config["T"] * config["EB"] * dtype.itemsize // 16 // (32 * config["num_warps"])
    assert code.accesses("LDG", 16) >= vectors


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_combining_splits(arch: int) -> None:
    pointers = {"p_top": "*fp32", "p_sum": "*fp32", "p_partial": "*fp32", "p_out": "*bf16"}
    for splits in (2, 64):
        code = compile_kernel(
            decode_attention._combine_kernel,
            pointers,
            {"E": 128, "EB": 128, "SPLITS": splits},
            divisible=pointers,
            num_warps=4,
            arch=arch,
        )
        assert_clean(code)
        assert splits == 2 or 16 in code.load_widths


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("dtype", "Hq", "Hkv", "E"), [(torch.bfloat16, 32, 32, 128), (torch.float32, 4, 2, 256)])
def test_prefill_attention(dtype: torch.dtype, Hq: int, Hkv: int, E: int, fp8: bool, arch: int) -> None:
    """On tensor cores, with 16 bytes of queries, keys and values at a time."""
    if fp8 and arch < 89:
        pytest.skip("converts no float8")
    config = prefill_attention.launch_config(E, dtype.itemsize)
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    types = dict.fromkeys(("p_q", "p_keys", "p_values", "p_out"), TYPES[dtype])
    types |= {"p_slots": "*i64", "p_first": "*i64", "q_stride": "i32", "N": "i32", "scale": "fp32"}
    constants = {"HQ": Hq, "HKV": Hkv, "E": E, "WIDE": False, **config}
    scales = ("p_key_scales", "p_value_scales")
    types |= dict.fromkeys(scales, "*fp32") | dict.fromkeys(("p_keys", "p_values"), "*fp8e4nv") if fp8 else {}
    constants |= {} if fp8 else dict.fromkeys(scales)
    code = compile_kernel(
        prefill_attention._prefill_attention_kernel,
        types,
        constants,
        divisible=types.keys() - {"scale"},
        arch=arch,
        **options,
    )
    assert_clean(code)
    assert code.shared <= 64 * 1024  # three programs or more on a multiprocessor
    if dtype == torch.bfloat16:
        assert code.count("HMMA", "HGMMA") >= 2 and 16 in code.load_widths


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("running", [False, True])
def test_record_draw(running: bool, arch: int) -> None:
    kernel, constants = record_draw._record_draw_kernel, {"K": 9, "GROWS": 3, "OUTPUT": 6, "D": 2048, "DB": 2048}
    constants |= {} if running else {"p_running": None}
    types = dict.fromkeys(("p_cond", "p_guided", "p_conds", "p_guideds"), "*fp32") | {"p_running": "*i1"}
    types |= {"p_table": "*bf16", "p_x": "*bf16", "stride": "i32", "end": "i32", "B": "i32"}
    signature = {name: types.get(name, "*i64") for name in kernel.arg_names if name not in constants}
    code = compile_kernel(
        kernel, signature, constants, divisible=signature.keys() - {"end", "B"}, arch=arch, num_warps=4
    )
    assert_clean(code)
    assert 16 in code.load_widths and 16 in code.store_widths


def compile_linear(R: int, add: bool, arch: int, pdl: bool = False, dtype: torch.dtype = torch.bfloat16) -> Compiled:
    """o and down of Janus-Pro-1B, or its gate and up."""
    kernel, config = decode_linear._decode_linear_kernel, decode_linear.launch_config(R, dtype.itemsize)
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    absent = ("p_squares",) if add else ("p_residual", "p_norm_weight", "p_new_squares", "p_partial", "p_arrived")
    constants = {"SQUARES": 0 if add else 32, "SILU": not add, "ADD": add, "SPLITS": 4 if add else 1}
    constants |= {"WIDE": False, "PDL": pdl, **config, **dict.fromkeys(absent)}
    types = dict.fromkeys(("p_squares", "p_new_squares", "p_partial", "eps"), "*fp32") | {"eps": "fp32"}
    types |= {"p_arrived": "*i32", "R": "i32", "N": "i32", "K": "i32"}
    signature = {name: types.get(name, TYPES[dtype]) for name in kernel.arg_names if name not in constants}
    return compile_kernel(kernel, signature, constants, divisible=signature.keys() - {"R", "eps"}, arch=arch, **options)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("R", [16, 32, 64])
def test_decode_linear(R: int, add: bool, arch: int) -> None:
    """Tiles are copied to shared memory 16 bytes at a time, several ahead of the tensor cores."""
    code = compile_linear(R, add, arch)
    assert_clean(code)
    assert code.load_widths == {16} and code.widths("LDGSTS") == {16} and code.store_widths <= {4, 8, 16}
    assert code.count("HMMA", "HGMMA") and code.registers <= 168
    assert code.shared <= (76 if R <= 32 else 132) * 1024  # of 227 KiB: three programs, or one
    assert "griddepcontrol" not in code.ptx and "prefetch" not in code.ptx


def test_early_weights() -> None:
    """A program that is launched early asks for weights, which no kernel writes, and waits before all else."""
    before, after = compile_linear(32, True, 90, pdl=True).ptx.split("griddepcontrol.wait")
    assert "prefetch.global.L2" in before and "ld.global" not in before and "cp.async" not in before
    assert "cp.async" in after and "griddepcontrol.launch_dependents" in after
