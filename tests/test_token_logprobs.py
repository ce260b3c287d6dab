"""token_logprobs against its float64 reference, never worse than the reference in the tested dtype."""

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    BFLOAT16_ROUNDING,
    CUDA,
    IMPLEMENTATIONS,
    KERNELS,
    TRITON,
    amid_nan,
    assert_no_worse,
    device,
    gpu,
    needs_native,
    no_host_sync,
    on_threads,
)
from torch import Tensor

from bicot.kernels import native
from bicot.kernels.dispatch import INTERPRETED
from bicot.kernels.token_logprobs import token_logprobs, token_logprobs_ref

# (relative, absolute): both dtypes' outputs are float32 sums of terms near 1; a bfloat16 gradient is rounded once
OUTPUT_TOLERANCE = (1e-6, 1e-6)
GRADIENT_TOLERANCE = {torch.float32: (1e-6, 2e-7), torch.bfloat16: (BFLOAT16_ROUNDING, 2e-7)}
DTYPES = list(GRADIENT_TOLERANCE)
VOCABULARIES = [1, 2, 7, 31, 33, 257, 1000, 16385]  # 257, 16385: rows begin at all offsets from 16-byte boundaries


def _peaked(x: Tensor) -> Tensor:
    x[:, x.shape[1] // 2] += 60
    return x


def _masked(x: Tensor) -> Tensor:
    return torch.where((x > -1) | (x == x.amax(-1, keepdim=True)), x, -torch.inf)


def _masked_prefix(x: Tensor) -> Tensor:
    x[:, : x.shape[1] - 1] = -torch.inf  # whole blocks of -inf before the first finite logit
    return x


LOGITS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: 3 * x,
    "tied": torch.zeros_like,
    "peaked": _peaked,
    "negative": lambda x: x - 100,
    "offset": lambda x: x + 1e4,
    "negative offset": lambda x: x - 1e4,
    "wide": lambda x: 1e3 * x,
    "rising": lambda x: (10 * x).sort(-1).values,  # every block raises the running maximum
    "falling": lambda x: (10 * x).sort(-1, descending=True).values,
    "masked": _masked,
    "masked prefix": _masked_prefix,
}


pytestmark = pytest.mark.usefixtures("poisoned")


def make(kind: str, N: int, V: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = LOGITS[kind](torch.randn(N, V, generator=generator)).to(dtype)
    targets = torch.randint(0, V, (N,), generator=generator)
    # not a target of probability 0: an error of -inf cannot be measured, see test_probability_zero
    return logits, torch.where(logits.gather(1, targets[:, None])[:, 0].isinf(), logits.argmax(-1), targets)


def run(op: Callable, logits: Tensor, targets: Tensor, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    """logprob, entropy and the gradient of a loss with other weights for both outputs of every token."""
    leaf = logits.detach().requires_grad_()
    activation = leaf.clone() if options.get("inplace_backward") else leaf
    stats = op(activation, targets, **options)
    n = torch.arange(1.0, len(logits) + 1, dtype=stats.logprob.dtype, device=logits.device)
    (n.cos() * stats.logprob + n.sin() * stats.entropy).sum().backward()
    assert leaf.grad is not None
    if options.get("inplace_backward"):
        assert torch.equal(activation, leaf.grad)
    return stats.logprob.detach(), stats.entropy.detach(), leaf.grad


def check(impl: str, logits: Tensor, targets: Tensor, temperature: float = 1.0, **options: object) -> None:
    gt = run(token_logprobs_ref, logits.double(), targets, temperature=temperature)
    eager = run(token_logprobs_ref, logits, targets, temperature=temperature)
    there = device(impl)
    ours = run(token_logprobs, logits.to(there), targets.to(there), temperature=temperature, impl=impl, **options)
    tolerances = (OUTPUT_TOLERANCE, OUTPUT_TOLERANCE, GRADIENT_TOLERANCE[logits.dtype])
    for name, g, e, o, tolerance in zip(("logprob", "entropy", "gradient"), gt, eager, ours, tolerances, strict=True):
        assert_no_worse(name, o.to(g.device), e, g, *tolerance)


def test_library_is_built_where_a_compiler_is() -> None:
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        pytest.skip("no C++ compiler")
    assert native.available()


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", VOCABULARIES)
@pytest.mark.parametrize("kind", LOGITS)
def test_no_worse_than_eager(kind: str, V: int, dtype: torch.dtype, impl: str) -> None:
    check(impl, *make(kind, 5, V, dtype))
    check(impl, *make(kind, 5, V, dtype), temperature=0.7, inplace_backward=True)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "tied", "offset"])
def test_no_worse_than_eager_at_text_vocabulary(kind: str, dtype: torch.dtype, impl: str) -> None:
    check(impl, *make(kind, 3, 102400, dtype))


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
def test_short_rows_touch_nothing_around_them(inplace: bool, dtype: torch.dtype, impl: str) -> None:
    """Few or no whole 16 bytes, at any offset from a multiple of 16 bytes."""
    for V in range(1, 18):
        for left in range(0, 16 // dtype.itemsize, 3):
            logits, targets = (x.to(device(impl)) for x in make("normal", 3, V, dtype))
            leaf = logits.requires_grad_()
            view, buffer = amid_nan(leaf, left)
            stats = token_logprobs(view, targets, inplace_backward=inplace, impl=impl)
            (stats.logprob + 0.3 * stats.entropy).sum().backward()
            exact = logits.detach().double().requires_grad_()
            expected = token_logprobs_ref(exact, targets)
            (expected.logprob + 0.3 * expected.entropy).sum().backward()
            for ours, gt in zip(stats, expected, strict=True):
                torch.testing.assert_close(ours.double(), gt, rtol=1e-6, atol=1e-6)
            relative = GRADIENT_TOLERANCE[dtype][0]
            torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=relative, atol=1e-6)
            assert buffer.isnan().sum() == buffer.numel() - view.numel(), "something around the rows was written"


@pytest.mark.parametrize("impl", [TRITON])
def test_float16(impl: str) -> None:
    logits, targets = make("normal", 5, 257, torch.float16)
    gt = run(token_logprobs_ref, logits.double(), targets)
    ours = run(token_logprobs, logits.to(device(impl)), targets.to(device(impl)), impl=impl)
    for g, o in zip(gt, ours, strict=True):
        torch.testing.assert_close(o.cpu().double(), g, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("impl", KERNELS)
@settings(max_examples=20 if INTERPRETED or CUDA else 60)  # most compile a kernel on a GPU
@given(
    N=st.integers(0, 5),
    V=st.integers(1, 300 if INTERPRETED else 3000),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(sorted(LOGITS)),
    temperature=st.floats(0.1, 10),
    seed=st.integers(0, 2**32),
)
def test_no_worse_than_eager_anywhere(
    impl: str, N: int, V: int, dtype: torch.dtype, kind: str, temperature: float, seed: int
) -> None:
    check(impl, *make(kind, N, V, dtype, seed), temperature=temperature)


VIEWS = {
    "padded": lambda x: x[:, :90],
    "every second row": lambda x: x[::2],
    "transposed": lambda x: x.T,
    "expanded": lambda x: x[:1].expand(8, -1),
    "shifted": lambda x: x[:, 3:],
}


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS)
def test_strided_logits_give_what_contiguous_ones_give(view: str, dtype: torch.dtype, impl: str) -> None:
    logits = VIEWS[view](make("normal", 64, 100, dtype)[0].to(device(impl)))
    targets = (torch.arange(2 * len(logits))[::2] % logits.shape[1]).to(device(impl))
    ours = run(token_logprobs, logits, targets, impl=impl)
    expected = run(token_logprobs, logits.contiguous(), targets.contiguous(), impl=impl)
    # the same bits in C++; Triton's order of summation depends on the 16-byte boundaries in a row
    exact = dict(rtol=0, atol=0) if impl == "native" else dict(rtol=2 * GRADIENT_TOLERANCE[dtype][0], atol=5e-7)
    torch.testing.assert_close(ours, expected, **exact)


@pytest.mark.parametrize("impl", KERNELS)
def test_same_bits_again(impl: str) -> None:
    logits, targets = (x.to(device(impl)) for x in make("normal", 37, 5000, torch.bfloat16))
    first = run(token_logprobs, logits, targets, impl=impl)
    assert all(map(torch.equal, first, run(token_logprobs, logits, targets, impl=impl)))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_with_any_number_of_threads(dtype: torch.dtype) -> None:
    logits, targets = make("normal", 37, 5000, dtype)
    first, *others = on_threads(lambda: run(token_logprobs, logits, targets, impl="native"), 1, 1, 2, 3)
    assert all(torch.equal(a, b) for again in others for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
class TestEveryImplementation:
    def test_properties(self, impl: str) -> None:
        logits, targets = (x.to(device(impl)) for x in make("normal", 9, 1000, torch.float32))
        logprob, entropy, gradient = (x.cpu() for x in run(token_logprobs, logits, targets, impl=impl))
        assert (logprob <= 0).all() and (entropy >= 0).all() and (entropy <= torch.tensor(1000.0).log()).all()
        # a constant added to all logits changes nothing
        torch.testing.assert_close(gradient.sum(-1), torch.zeros(9), atol=1e-5, rtol=0)

    def test_probability_zero(self, impl: str) -> None:
        logits = torch.tensor([[0.0, -torch.inf, 0.0], [-torch.inf, 2.0, -torch.inf]], device=device(impl))
        logprob, entropy, gradient = run(token_logprobs, logits, torch.tensor([1, 1]).to(logits.device), impl=impl)
        assert logprob.tolist() == [-torch.inf, 0]
        torch.testing.assert_close(entropy.cpu(), torch.tensor([2.0, 1.0]).log())
        assert gradient.isfinite().all() and gradient[1].eq(0).all() and gradient[0, 1] != 0

    @pytest.mark.parametrize(("logit", "bad"), [(20, torch.nan), (20, torch.inf), (slice(None), -torch.inf)])
    def test_a_token_without_a_distribution_is_nan_and_alone(self, impl: str, logit: int | slice, bad: float) -> None:
        logits = torch.zeros(3, 50, device=device(impl))
        logits[1, logit] = bad
        stats = token_logprobs(logits, torch.zeros(3, dtype=torch.int64, device=logits.device), impl=impl)
        assert stats.entropy.isnan().tolist() == [False, True, False]
        assert not stats.logprob[1].isfinite() and stats.logprob[::2].isfinite().all()
        assert bad != -torch.inf or stats.logprob[1].isnan()

    def test_nan_among_masked_logits_shows(self, impl: str) -> None:
        """More of them than a kernel reads at a time."""
        logits = torch.zeros(2, 20_000, device=device(impl))
        logits[:, :18_000] = -torch.inf
        logits[1, 5] = torch.nan
        logprob, entropy, gradient = run(token_logprobs, logits, torch.tensor([0, 19_000]).to(logits.device), impl=impl)
        assert entropy.isnan().tolist() == [False, True] and logprob[1].isnan() and gradient[1].isnan().any()
        assert entropy[0].item() == pytest.approx(math.log(2000)) and logprob[0] == -torch.inf

    def test_no_tokens(self, impl: str) -> None:
        logits = torch.empty(0, 7, device=device(impl))
        logprob, entropy, gradient = run(token_logprobs, logits, torch.empty(0).to(logits.device).long(), impl=impl)
        assert logprob.shape == entropy.shape == (0,) and gradient.shape == (0, 7)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_compiles_without_a_graph_break(self, impl: str) -> None:
        logits, targets = (x.to(device(impl)) for x in make("normal", 6, 70, torch.float32))
        for options in ({"impl": impl}, {"impl": "auto"}, {"impl": impl, "inplace_backward": True}):
            if options.get("inplace_backward") and impl == "torch":
                continue
            compiled = torch.compile(token_logprobs, fullgraph=True, backend="aot_eager")
            ours = run(compiled, logits, targets, temperature=0.7, **options)
            torch.testing.assert_close(ours, run(token_logprobs, logits, targets, temperature=0.7, **options))

    @pytest.mark.parametrize("target", [-1, 7])
    def test_target_outside_vocabulary(self, impl: str, target: int) -> None:
        if device(impl) == "cuda":
            pytest.skip("a device assertion, which ends the process's CUDA context")
        with pytest.raises(ValueError, match=rf"targets must be in \[0, 7\): targets\[2\] = {target}"):
            token_logprobs(torch.zeros(4, 7), torch.tensor([0, 6, target, 9]), impl=impl)


@pytest.mark.parametrize("impl", KERNELS)
def test_opcheck(impl: str) -> None:
    for dtype in DTYPES:
        logits, targets = (x.to(device(impl)) for x in make("normal", 4, 33, dtype))
        ops = torch.ops.bicot
        torch.library.opcheck(ops.token_logprobs.default, (logits.clone().requires_grad_(), targets, 0.7, False, impl))
        _, entropy, lse = ops.token_logprobs(logits, targets, 0.7, False, impl)
        gradients = torch.ones_like(entropy), torch.ones_like(entropy)
        for op in (ops.token_logprobs_backward.default, ops.token_logprobs_backward_.default):
            torch.library.opcheck(op, (*gradients, logits, targets, entropy, lse, 0.7, impl))


@pytest.mark.parametrize("impl", KERNELS)
def test_overwriting_logits_that_another_operation_needs(impl: str) -> None:
    logits, targets = (x.to(device(impl)) for x in make("normal", 4, 33, torch.float32))
    activation = logits.requires_grad_().clone()
    other = activation.square().sum()  # before, so that its backward comes after ours
    total = token_logprobs(activation, targets, inplace_backward=True, impl=impl).logprob.sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (total + other).backward()


@gpu
def test_more_elements_than_a_32_bit_offset_reaches() -> None:
    N, V = 140_000, 16_384  # 2.3e9 logits, 4.6 GB
    logits = torch.randn(N, V, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(0, V, (N,), device="cuda")
    last = logits[-3:].clone()
    stats = token_logprobs(logits.requires_grad_().mul(1), targets, inplace_backward=True, impl="triton")
    expected = run(token_logprobs_ref, last.double(), targets[-3:])
    torch.testing.assert_close(stats.logprob[-3:].double(), expected[0], rtol=1e-5, atol=1e-5)
    weights = torch.zeros(N, device="cuda")
    weights[-3:] = torch.arange(1.0, 4.0, device="cuda").cos()
    (weights * stats.logprob).sum().backward()
    p = last.double().softmax(-1)
    exact = weights[-3:, None] * (torch.nn.functional.one_hot(targets[-3:], V) - p)
    torch.testing.assert_close(logits.grad[-3:].double(), exact, rtol=BFLOAT16_ROUNDING, atol=1e-7)
    assert logits.grad[:-3].abs().max() == 0


@gpu
def test_more_tokens_than_any_but_the_first_dimension_of_a_grid_holds() -> None:
    logits, targets = (x.cuda() for x in make("normal", 70_000, 257, torch.float32))
    ours = run(token_logprobs, logits, targets, impl="triton")
    torch.testing.assert_close(ours, run(token_logprobs_ref, logits, targets), rtol=1e-5, atol=1e-5)


@gpu
def test_nothing_waits_for_the_device() -> None:
    logits, targets = (x.cuda() for x in make("normal", 64, 1000, torch.bfloat16))
    run(token_logprobs, logits, targets, impl="triton")  # compiles
    with no_host_sync():
        run(token_logprobs, logits, targets, impl="triton")


def test_float64_gradient_against_finite_differences() -> None:
    logits, targets = make("normal", 3, 11, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: tuple(token_logprobs(x, targets, temperature=0.7)), logits.requires_grad_()
    )


LOGITS_OK, TARGETS_OK = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("logits", "targets", "options", "message"),
    [
        (torch.zeros(2, 3, 4), TARGETS_OK, {}, r"logits must be \[N, V\] floating point, got \[2, 3, 4\]"),
        (torch.zeros(2, 3, dtype=torch.int64), TARGETS_OK, {}, "logits must be .* got .* torch.int64"),
        (LOGITS_OK, TARGETS_OK[:1], {}, r"targets must be \[N\] = \[2\] to match logits, got \[1\]"),
        (LOGITS_OK, TARGETS_OK.int(), {}, "targets must be int64, got torch.int32"),
        (LOGITS_OK, TARGETS_OK.to("meta"), {}, "must share a device, got cpu and meta"),
        (LOGITS_OK, TARGETS_OK, {"temperature": 0.0}, "temperature must be positive, got 0.0"),
        (LOGITS_OK, TARGETS_OK, {"temperature": torch.nan}, "temperature must be positive, got nan"),
        (LOGITS_OK, TARGETS_OK, {"impl": "cuda"}, "impl must be .* got 'cuda'"),
        (LOGITS_OK.double(), TARGETS_OK, {"impl": "native"}, "takes float32 or bfloat16 .* got torch.float64 on cpu"),
        (torch.zeros(2, 3, requires_grad=True), TARGETS_OK, {"inplace_backward": True}, "cannot overwrite a leaf"),
        (torch.zeros(6, requires_grad=True).view(2, 3), TARGETS_OK, {"inplace_backward": True}, "or a view of one"),
        (torch.zeros(3, 2).T, TARGETS_OK, {"inplace_backward": True}, r"cannot overwrite logits of strides \(1, 2\)"),
    ],
)
def test_bad_input_is_named(logits: Tensor, targets: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_logprobs(logits, targets, **options)


@pytest.fixture
def unloaded() -> Iterator[None]:
    """The library is looked for again, also by the tests that follow."""

    def clear() -> None:
        for cached in (native._load, native.function):
            cached.cache_clear()

    clear()
    yield
    clear()


def test_without_the_library(unloaded: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "_native.so")
    with pytest.warns(UserWarning, match=r"_native.so does not exist.*pip install -e \."):
        stats = token_logprobs(LOGITS_OK, TARGETS_OK)
    assert torch.equal(stats.logprob, token_logprobs_ref(LOGITS_OK, TARGETS_OK).logprob)
    with pytest.raises(RuntimeError, match="_native.so does not exist"):
        token_logprobs(LOGITS_OK, TARGETS_OK, impl="native")


@needs_native
def test_a_library_of_other_sources_is_not_called(
    unloaded: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its functions may take other arguments, and would write anywhere."""
    shutil.copytree(native.SOURCES, tmp_path / "csrc")
    (tmp_path / "csrc" / "simd.h~").touch()  # an editor's copy is no source
    monkeypatch.setattr(native, "SOURCES", tmp_path / "csrc")
    assert native.available()
    native._load.cache_clear()
    with (tmp_path / "csrc" / "simd.h").open("a") as file:
        file.write("// changed\n")
    with pytest.warns(UserWarning, match=r"built from other sources than those in .*csrc\).*pip install -e \."):
        assert not native.available()
