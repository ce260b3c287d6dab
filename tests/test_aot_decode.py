"""The machine code of the decoder's kernels around attention, compiled ahead of time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from aot import ARCHITECTURES, Compiled, assert_clean, compile_kernel, needs_compiler

from bicot.kernels import rms_norm, rope_kv_write, silu_mul

pytestmark = needs_compiler

TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
POINTERS = {"p_positions": "*i64", "p_slots": "*i64", "p_key_scales": "*fp32", "p_value_scales": "*fp32"}


def compiled(kernel: Any, element: str, config: dict[str, Any], constants: dict[str, Any], arch: int) -> Compiled:
    """Every argument that is no constant is a pointer that torch allocated, but for eps."""
    options = {name: config[name] for name in ("num_warps", "enable_fp_fusion")}
    constants = {name: value for name, value in config.items() if name not in options} | constants
    types = POINTERS | {"eps": "fp32"}
    signature = {name: types.get(name, element) for name in kernel.arg_names if name not in constants}
    if constants.get("FP8"):
        signature |= dict.fromkeys(("p_keys", "p_values"), "*fp8e4nv")
    divisible = signature.keys() - {"eps"}
    return compile_kernel(kernel, signature, constants, divisible=divisible, arch=arch, **options)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("D", [1000, 2048, 4096])
def test_rms_norm(D: int, residual: bool, dtype: torch.dtype, arch: int) -> None:
    constants = {"D": D, "HAS_RESIDUAL": residual} | ({} if residual else {"p_residual": None})
    code = compiled(rms_norm._rms_norm_kernel, TYPES[dtype], rms_norm.launch_config(D), constants, arch)
    assert_clean(code)
    assert code.registers <= 40 and code.load_widths == code.store_widths == {16}
    accesses = dtype.itemsize // 2  # of eight elements
    assert code.count("LDG") == (2 + residual) * accesses and code.count("STG") == (1 + residual) * accesses
    if dtype == torch.bfloat16:  # y, the product and the sum are each rounded, two elements at a time
        assert sum(n for opcode, n in code.opcodes.items() if "BF16" in opcode) == 4 * (2 + residual)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [5632, 11008])
def test_silu_mul(size: int, dtype: torch.dtype, arch: int) -> None:
    code = compiled(silu_mul._silu_mul_kernel, TYPES[dtype], silu_mul._CONFIG, {"SIZE": size}, arch)
    assert_clean(code)
    assert code.registers <= 40 and code.load_widths == code.store_widths == {16}
    assert code.count("LDG") == dtype.itemsize and code.count("STG") == dtype.itemsize // 2


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("Hq", "Hkv", "E"), [(16, 16, 128), (32, 8, 80)])
def test_rope_kv_write(Hq: int, Hkv: int, E: int, fp8: bool, dtype: torch.dtype, arch: int) -> None:
    if fp8 and arch < 89:
        pytest.skip("it has no float8")
    constants = {"HQ": Hq, "HKV": Hkv, "HALF": E // 2, "FP8": fp8}
    constants |= {} if fp8 else {"p_key_scales": None, "p_value_scales": None}
    config = rope_kv_write.launch_config(E // 2)
    code = compiled(rope_kv_write._rope_kv_write_kernel, TYPES[dtype], config, constants, arch)
    assert_clean(code)
    # the one narrower load is that of a position or a slot; scales are 4 bytes, float8 is 8 for what else is 16 or 32
    assert code.registers <= 64 and code.load_widths <= {8, 16}
    assert code.opcodes["LDG.E.64"] + code.opcodes["LDG.E.64.CONSTANT"] == 2
    assert code.store_widths == ({4, 8, 16} if fp8 else {16})
    assert code.shared == 0 and code.count("LDS", "STS", "BAR") == 0
    assert ("cvt.rn.satfinite.e4m3x2.f32" in code.ptx) == fp8  # rounded to nearest
