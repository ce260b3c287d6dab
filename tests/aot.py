"""Compile a Triton kernel without a GPU, and read its machine code.

A correct kernel can be slow: it spills registers, or it reads 2 bytes at a time because the compiler does not know that
an argument is divisible by 16. Both can be seen in the machine code, and Triton ships the tools that read it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from bicot.kernels.dispatch import HAS_TRITON, INTERPRETED

ARCHITECTURES = [80, 90]  # A100, H100/H200
# Kernels that move 16 bytes at a time are compiled for these. Float32 needs no conversion: one architecture is enough.
TARGETS = [(torch.bfloat16, 80), (torch.bfloat16, 90), (torch.float32, 90)]

needs_compiler = pytest.mark.skipif(
    not HAS_TRITON or INTERPRETED, reason="compiling needs Triton, without TRITON_INTERPRET=1"
)


@dataclass(frozen=True)
class Compiled:
    """A kernel for one architecture. `stack` is in bytes of a thread, `shared` in bytes of a program."""

    ptx: str
    registers: int  # of a thread
    stack: int
    shared: int
    opcodes: Counter[str]  # number of each SASS instruction, e.g. {"LDG.E.128": 4}

    def count(self, *names: str) -> int:
        """Number of instructions with one of these names: count("LDL", "STL"), count("HMMA", "HGMMA")."""
        return sum(n for opcode, n in self.opcodes.items() if opcode.split(".")[0] in names)

    def accesses(self, name: str, width: int) -> int:
        """Instructions `name` (LDG, STG) by which a thread moves `width` bytes."""
        return sum(n for opcode, n in self.opcodes.items() if opcode.split(".")[0] == name and _width(opcode) == width)

    def widths(self, *names: str) -> set[int]:
        """Bytes a thread moves by one such instruction."""
        return {_width(opcode) for opcode in self.opcodes if opcode.split(".")[0] in names}

    @property
    def load_widths(self) -> set[int]:
        """Bytes a thread reads from global memory by one instruction, copies into shared memory included."""
        return self.widths("LDG", "LDGSTS")

    @property
    def store_widths(self) -> set[int]:
        return self.widths("STG")


def _width(opcode: str) -> int:
    """Bytes of one access: LDG.E.U16 is 2, STG.E is 4, LDG.E.LTC128B.128 is 16."""
    bits = [int(m[1]) for part in opcode.split(".") if (m := re.fullmatch(r"[US]?(8|16|64|128|256)", part))]
    return bits[0] // 8 if bits else 4


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    *,
    divisible: Collection[str] = (),
    num_warps: int,
    num_stages: int = 3,
    arch: int = 90,
    enable_fp_fusion: bool = True,
    maxnreg: int | None = None,
) -> Compiled:
    """Compile `kernel` (decorated by @triton.jit) as its launch would.

    Args:
        signature: type of each run-time argument: "*bf16", "*fp32", "*i64", "i32", "i64", "fp32", ...
        constexprs: the others; those with a default may be left out.
        divisible: run-time arguments that are multiples of 16: pointers that torch allocated (they are aligned), and
            integers such as V = 16384. A launch tells the compiler so by itself, unless the kernel says
            `do_not_specialize`.
        num_warps, num_stages, enable_fp_fusion, maxnreg: as given at the launch.
        arch: 80 (A100), 90 (H100, H200), ...
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constexprs = {p.name: p.default for p in kernel.params if p.has_default} | dict(constexprs)
    signature = {name: kind for name, kind in signature.items() if name not in constexprs}
    divisible = set(divisible) - constexprs.keys()
    assert signature.keys() | constexprs.keys() == set(kernel.arg_names), "an argument is missing, or one is unknown"
    unknown = divisible - signature.keys() | {
        p.name
        for p in kernel.params
        if p.name in divisible and (p.do_not_specialize or p.do_not_specialize_on_alignment)
    }
    assert not unknown, f"a launch never knows that {unknown} are divisible by 16"
    source = ASTSource(
        kernel,
        signature={name: signature.get(name, "constexpr") for name in kernel.arg_names},
        constexprs=constexprs,
        # sorted: Triton's cache would not know the same kernel again in another order
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in sorted(divisible)},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": enable_fp_fusion}
    options |= {} if maxnreg is None else {"maxnreg": maxnreg}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tools = triton.knobs.nvidia
        usage = _output(tools.cuobjdump.path, "--dump-resource-usage", cubin.name)
        sass = _output(tools.nvdisasm.path, "-c", "--no-dataflow", cubin.name)  # a third faster
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    # "/*0180*/  @!P0 LDG.E.128 R16, ..." and, within a loop, the same without a predicate
    opcodes = Counter(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE))
    assert opcodes["EXIT"], "nvdisasm printed no code"
    return Compiled(compiled.asm["ptx"], used["REG"], used["STACK"] + used["LOCAL"], compiled.metadata.shared, opcodes)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def assert_clean(compiled: Compiled) -> None:
    """Everything stays in registers: no stack, no spills, no other local memory."""
    local = compiled.count("LDL", "STL")
    assert compiled.stack == 0 and local == 0, f"{compiled.stack} bytes of stack, {local} local loads and stores"
