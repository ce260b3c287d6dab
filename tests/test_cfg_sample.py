"""cfg_sample against its formulas in float64: the exact distribution, the token that comes in first, Philox by its
vectors; and all implementations against each other: the same tokens, bit for bit."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import (
    IMPLEMENTATIONS,
    KERNELS,
    NATIVE,
    amid_nan,
    assert_no_worse,
    device,
    gpu,
    moved,
    no_host_sync,
    poisoned_outputs,
)
from torch import Tensor

from bicot.kernels import cfg_sample as module
from bicot.kernels.cfg_sample import Draw, cfg_sample, exponential, philox
from bicot.kernels.dispatch import INTERPRETED

# the interpreter's NumPy warns of -inf - -inf, which a masked token is
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

# absolute, of a log-prob: a float32 log-sum-exp of terms near 1; float64 is there for the tests of the formula
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}
INF = math.inf
LEAST, MOST = 7183792349, 8209737  # counters that give token 0 the words 0 and 0xFFFFFFCC, under seed 0
INT64 = st.integers(-(2**63), 2**63 - 1)
EXAMPLES = 12 if INTERPRETED else 150
DTYPES = [torch.bfloat16] if INTERPRETED else [torch.float32, torch.bfloat16]  # where other tests have both
TRUNCATED, GREEDY = {"temperature": 0.7, "top_k": 9, "top_p": 0.9}, {"temperature": 0.0}

kernels = pytest.mark.parametrize("impl", KERNELS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def few(count: int) -> int:
    """The interpreter takes 15 ms for a row, and 50 to truncate it."""
    return min(count, 6) if INTERPRETED else count


@pytest.fixture(params=IMPLEMENTATIONS, scope="module")
def impl(request: pytest.FixtureRequest) -> str:
    """Every implementation that can run here, unless a test has its own list."""
    return request.param


@pytest.fixture(autouse=True)
def _poison_outputs() -> Iterator[None]:
    with poisoned_outputs():
        yield


def normals(*shape: int, seed: int = 0) -> Tensor:
    """Logits of deviation 2."""
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample(impl: str, cond: Tensor, uncond: Tensor | None, **options: Any) -> Draw:
    """cfg_sample where `impl` runs, from offsets 0, 1, ... under seed 0 unless told; the results back here."""
    options = {"seed": 0, "offset": torch.arange(len(cond))} | options
    there = {key: x.to(device(impl)) if isinstance(x, Tensor) else x for key, x in options.items()}
    logits = (x if x is None else moved(x, device(impl)) for x in (cond, uncond))
    return Draw(*(x.cpu() for x in cfg_sample(*logits, **there, impl=impl)))


def assert_alike(ours: Draw, expected: Draw, rtol: float = 1e-6, atol: float = 1e-5) -> None:
    """The same tokens, and log-probs of sums in another order."""
    assert torch.equal(ours.token, expected.token)
    torch.testing.assert_close(ours[1:], expected[1:], rtol=rtol, atol=atol)


def assert_draws_what_the_reference_draws(impl: str, cond: Tensor, uncond: Tensor | None, **options: Any) -> None:
    assert_alike(sample(impl, cond, uncond, **options), sample("torch", cond, uncond, **options))


def philox4x32(counter: list[int], key: list[int], rounds: int = 7) -> list[int]:
    """The paper's figure, in unbounded integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(rounds):
        hi0, lo0 = divmod(0xD2511F53 * c0, 2**32)
        hi1, lo1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def words_of(seed: int, offset: int, call: int) -> list[int]:
    words = [v >> shift & 0xFFFFFFFF for v in (offset % 2**64, seed % 2**64) for shift in (0, 32)]
    return philox4x32([*words[:2], call, 0], words[2:])


def word(seed: int, offset: int, v: int) -> int:
    """The random bits of token v."""
    return words_of(seed, offset, 64 * (v // 256) + v % 64)[v // 64 % 4]


def words_of_rows(seed: int, offset: Tensor, V: int) -> Tensor:
    """The same for rows of V tokens, [B, V]."""
    v = torch.arange(V)
    four = torch.stack(philox(seed, offset[:, None], 64 * (v // 256) + v % 64))
    return four.gather(0, (v // 64 % 4).expand(1, len(offset), V))[0]


def guided(cond: Tensor, uncond: Tensor | None, guidance: float) -> Tensor:
    """Guided logits in the dtype of `cond`."""
    if uncond is None or guidance == 1:
        return cond
    z = uncond + guidance * (cond - uncond)
    return z.masked_fill((cond == -INF) | (uncond == -INF), -INF)


def distribution(
    cond: Tensor,
    uncond: Tensor | None = None,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """What is drawn from for rows [V]: softmax, top-k, then top-p, ties to the smaller id."""
    z = guided(cond.double(), None if uncond is None else uncond.double(), guidance)
    z, order = z.sort(descending=True, stable=True)
    probs = (z / temperature)[: top_k or None].softmax(0)
    probs = probs.where(probs.cumsum(0) - probs < top_p, 0.0)
    return torch.zeros_like(z).scatter(0, order[: len(probs)], probs / probs.sum())


def log_probs(
    cond: Tensor, uncond: Tensor | None, token: Tensor, guidance: float = 1.0, temperature: float = 1.0, **_: Any
) -> list[Tensor]:
    """logp_cond and logp_guided in float64."""
    cond, uncond = cond.double(), None if uncond is None else uncond.double()
    scaled = [z / (temperature or 1.0) for z in (cond, guided(cond, uncond, guidance))]
    return [z.log_softmax(-1).gather(-1, token[:, None])[:, 0] for z in scaled]


class TestPhilox:
    def test_the_oracle_gives_random123s_published_vectors(self) -> None:
        ones = 0xFFFFFFFF
        assert philox4x32([0] * 4, [0] * 2, 10) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
        assert philox4x32([0] * 4, [0] * 2) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
        assert philox4x32([ones] * 4, [ones] * 2, 10) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
        pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
        assert philox4x32(pi, [0xA4093822, 0x299F31D0], 10) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]

    @settings(deadline=None, max_examples=200)
    @given(INT64, st.lists(INT64, min_size=1, max_size=5), st.integers(0, 2**32 - 1))
    def test_equals_the_oracle_for_any_key_and_counter(self, seed: int, offsets: list[int], call: int) -> None:
        words = torch.stack(philox(seed, torch.tensor(offsets), torch.tensor(call)), dim=1)
        assert words.tolist() == [words_of(seed, o, call) for o in offsets]

    def test_edges_of_words(self) -> None:
        for seed, offset in itertools.product((0, 2**32 - 1, 2**31, 2**63 - 1, -1, -(2**63)), repeat=2):
            for key in (seed, torch.tensor(seed)):
                words = philox(key, torch.tensor(offset), torch.tensor(7))
                assert [x.item() for x in words] == words_of(seed, offset, 7)

    def test_uniform(self) -> None:
        # 2^16 words, as the engine counts them: sample << 32 | token, of rows of 256. 256 cells of 256
        offset = ((torch.arange(16) << 32)[:, None] + torch.arange(16)).flatten()
        words = words_of_rows(1, offset, 256)
        for cells in (words >> 24, words & 0xFF):
            assert_drawn_from(cells.flatten(), torch.full((256,), 1 / 256))
        assert len(words.unique()) > 2**16 - 5  # by chance 0.5 pairs are equal

    def test_exponential(self) -> None:
        words = [0, 1, 2, 1000, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**31 + 999, 2**32 - 300, 2**32 - 1]
        words += torch.randint(2**32, (2_000,), generator=torch.Generator().manual_seed(0)).tolist()
        words += [w >> i % 32 for i, w in enumerate(words)]
        for w, e in zip(words, exponential(torch.tensor(words)).tolist(), strict=True):
            u = min(float(np.float32(w) + np.float32(0.5)) / 2**32, 1 - 2**-24)
            assert e == pytest.approx(-math.log1p(-u), rel=3e-7) and u <= e < 17
            assert e == exact_exponential(w)


def assert_drawn_from(token: Tensor, probs: Tensor) -> None:
    """Chi-square at one in a million (seeds are fixed: it passes always or never); no token of probability 0."""
    counts, expected = torch.bincount(token, minlength=len(probs)).double(), len(token) * probs.double()
    assert len(counts) == len(probs) and not counts[probs == 0].any()
    rare = expected < 8  # one cell together
    rest_count, rest = counts[rare].sum(), expected[rare].sum()
    counts, expected = counts[~rare], expected[~rare]
    if rest > 8:
        counts, expected = torch.cat([counts, rest_count[None]]), torch.cat([expected, rest[None]])
    else:
        assert rest_count < 40  # Poisson of mean 8 at most
    df, statistic = len(counts) - 1, ((counts - expected) ** 2 / expected).sum()
    # Wilson and Hilferty's quantile of chi-square at 4.75 standard deviations
    assert statistic <= df * (1 - 2 / (9 * df) + 4.75 * math.sqrt(2 / (9 * df))) ** 3 if df else statistic < 1e-3


N_DRAWS = 20_000
FLAT, NORMAL = torch.zeros(50), normals(40)
PEAKED = NORMAL + 12.0 * (torch.arange(40) == 13)
WITH_MASK = NORMAL.masked_fill(torch.arange(40) % 3 == 0, -INF)
UNCOND = NORMAL - 0.4 * normals(40, seed=1)  # w = 5 makes about 2·NORMAL


@dtypes
@pytest.mark.parametrize(
    ("cond", "uncond", "options"),
    [
        (FLAT, None, {}),
        (NORMAL, None, {}),
        (NORMAL, None, {"temperature": 0.6}),
        (NORMAL, None, {"temperature": 1.7}),
        (PEAKED, None, {}),
        (WITH_MASK, None, {}),
        (NORMAL, None, {"top_k": 7}),
        (FLAT, None, {"top_k": 7}),
        (NORMAL, None, {"temperature": 1.7, "top_p": 0.83}),
        (NORMAL, None, {"temperature": 1.7, "top_k": 12, "top_p": 0.83}),
        (NORMAL, UNCOND, {"guidance": 5.0}),
        (NORMAL, UNCOND, {"guidance": 5.0, "temperature": 1.3, "top_k": 9, "top_p": 0.83}),
        (NORMAL, UNCOND, {"guidance": 0.0}),
        (WITH_MASK, UNCOND, {"guidance": 5.0}),
        (UNCOND, WITH_MASK, {"guidance": 5.0, "top_p": 0.83}),
        (normals(2000) / 2, None, {}),
    ],
)
def test_draws_follow_the_exact_distribution(
    cond: Tensor, uncond: Tensor | None, options: dict[str, Any], dtype: torch.dtype, impl: str
) -> None:
    N = few(N_DRAWS // (len(cond) // 1000 + 1))
    cond, uncond = (None if x is None else x.to(dtype) for x in (cond, uncond))
    rows = [None if x is None else x.expand(N, -1) for x in (cond, uncond)]
    token = sample(impl, *rows, **options, seed=11).token
    assert token.dtype == torch.int64
    if N > 100:
        assert_drawn_from(token, distribution(cond, uncond, **options))
    else:  # too few for a test of their distribution
        assert torch.equal(token, sample("torch", *rows, **options, seed=11).token)


def test_the_chi_square_finds_a_wrong_temperature() -> None:
    token = sample("auto", NORMAL.expand(N_DRAWS, -1), None, seed=11).token
    with pytest.raises(AssertionError):
        assert_drawn_from(token, distribution(NORMAL, temperature=1.1))


@pytest.mark.parametrize("impl", [NATIVE])
def test_rare_tokens_are_drawn_as_often_as_they_should(impl: str) -> None:
    logits = torch.tensor([1e-5, 1e-4, 1e-3, 1e-2, 1.0]).log()
    token = sample(impl, logits.expand(4_000_000, -1), None, seed=3, offset=torch.arange(4_000_000) << 20).token
    assert_drawn_from(token, distribution(logits))


@st.composite
def short_rows(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """cond and uncond [V] of quarters, which are exact in float32 under any guidance here, and often tied; options."""
    V = draw(st.integers(1, 30))
    quarters = st.integers(-24, 24).map(lambda i: i / 4) | st.just(-INF)
    values = st.lists(quarters, min_size=V, max_size=V).map(torch.tensor)
    options = {
        "guidance": draw(st.sampled_from([0.0, 0.5, 1.0, 2.0, 5.0])),
        "temperature": draw(st.sampled_from([0.3, 0.7, 1.0, 1.9])),
        "top_k": draw(st.integers(0, 40)),
        "top_p": draw(st.just(1.0) | st.floats(0.01, 1.0)),
    }
    return draw(values), draw(st.none() | values), options


@settings(deadline=None, max_examples=EXAMPLES)
@given(short_rows(), INT64, st.integers(0, 2**63 - 1))
def test_draws_the_token_that_comes_in_first(impl: str, row: tuple, seed: int, offset: int) -> None:
    cond, uncond, options = row
    assume(all(x is None or x.max() > -INF for x in (uncond, guided(cond, uncond, options["guidance"]))))
    whole = distribution(cond, uncond, **options | {"top_p": 1.0}).sort(descending=True).values
    assume(((whole.cumsum(0) - whole - options["top_p"]).abs() > 1e-5).all())
    rows = [x if x is None else x[None] for x in (cond, uncond)]
    draw = sample(impl, *rows, **options, seed=seed, offset=torch.tensor([offset]))

    q, token = distribution(cond, uncond, **options), int(draw.token)
    assert q[token] > 0
    words = torch.tensor([word(seed, offset, v) for v in range(len(cond))], dtype=torch.float64)
    times = -torch.log1p(-(words + 0.5) / 2**32) / q
    assert times[token] <= times.min() * (1 + 1e-5)
    for ours, expected in zip(draw[1:], log_probs(*rows, draw.token, **options), strict=True):
        assert ours.item() == pytest.approx(expected.item(), abs=TOLERANCE[torch.float32])


@pytest.mark.parametrize("truncation", [{}, {"top_k": 5}, {"top_p": 0.89}])
def test_extreme_noise_draws_a_possible_token(truncation: dict, impl: str) -> None:
    assert (word(0, LEAST, 0), word(0, MOST, 0)) == (0, 0xFFFFFFCC)
    ends_masked, ends_impossible = (F.pad(normals(30), (3, 3), value=x) for x in (-INF, -2000.0))  # e^-2000 is 0
    alone = torch.tensor([3.0] + [-INF] * 5)
    for counter in (LEAST, MOST):
        offset = torch.tensor([counter])
        for z in (ends_masked, ends_impossible, normals(30), torch.zeros(30), PEAKED, torch.zeros(1), alone):
            draw = sample(impl, z[None], None, **truncation, offset=offset)
            assert distribution(z, **truncation)[int(draw.token)] > 0 and draw.logp_guided.isfinite()
        for z in ([0.0, 0.0], [-20.0, 0.0]):  # the least noise wins against e^20, the most loses
            assert int(sample(impl, torch.tensor([z]), None, offset=offset).token) == (counter == MOST)


@pytest.mark.parametrize("V", [1, 2047, 4097] if INTERPRETED else [1, 2, 255, 257, 4097, 16385, 102400, 2**17 + 1])
def test_every_counter_and_key_draws_from_a_flat_row_its_least_word(V: int, impl: str) -> None:
    counters = [0, 1, 2**32 - 1, 2**32, 2**63 - 1, -1, -(2**63), LEAST, MOST, *range(100, few(110))]
    for seed in (0, -1, 2**40 + 7):
        offset = torch.tensor(counters)
        draw = sample(impl, torch.full((1, V), -3.5).expand(len(counters), -1), None, seed=seed, offset=offset)
        assert draw.token.tolist() == words_of_rows(seed, offset, V).argmin(1).tolist()
        torch.testing.assert_close(draw.logp_cond, torch.full((len(counters),), -math.log(V)), rtol=1e-6, atol=1e-6)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """cond, uncond and options: any dtype and strides; masks that leave a token; ties, zeros of both signs."""
    B, V = draw(st.integers(1, 2 if INTERPRETED else 5)), draw(st.integers(1, 70) | st.integers(1000, 2100))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    step, spread, masked = draw(st.sampled_from([0, 0.5, 2])), draw(st.sampled_from([0.1, 3, 40])), draw(st.booleans())
    view = draw(st.integers(1 if masked else 0, 3))

    def logits() -> Tensor:
        # of a wider matrix, so that rows start anywhere between multiples of 16 bytes
        x = spread * torch.randn(2 * B, V + 7, generator=generator)
        if step:
            x = (x / step).round() * step  # -0.0 too
        if masked:
            x[torch.rand(x.shape, generator=generator) < 0.3] = -INF
            x[:, 3] = 0
        x = x.to(dtype)
        inner = x[:B, 3 : 3 + V]
        return [x[:B, :V].contiguous(), x[::2, 3 : 3 + V], inner.T.contiguous().T, inner[:1].expand(B, -1)][view]

    options = {
        "guidance": draw(st.sampled_from([1.0, 5.0, 0.0, 0.5, 3.3, -1.0, 1e30])),
        "temperature": draw(st.sampled_from([1.0, 0.7, 0.0, 1.9, 100.0, 0.01, 1e-320, 1e300])),
        "top_k": draw(st.just(0) | st.integers(1, 80)),
        "top_p": draw(st.just(1.0) | st.floats(0.01, 1.0) | st.sampled_from([5e-324, 1e-9, 1 - 2**-53])),
        "seed": draw(INT64),
        "offset": torch.tensor(draw(st.lists(INT64, min_size=B, max_size=B))),
    }
    return logits(), draw(st.sampled_from([None, logits()])), options


class TestReference:
    @kernels
    @settings(deadline=None, max_examples=2 * EXAMPLES)
    @given(problems())
    def test_draws_what_the_reference_draws(self, impl: str, problem: tuple) -> None:
        cond, uncond, options = problem
        z = guided(cond.float(), uncond if uncond is None else uncond.float(), options["guidance"])
        assume(z.amax(-1).isfinite().all())
        # log-probs reach 1e4 at the lowest temperatures, where float32 has 3 digits
        assert_draws_what_the_reference_draws(impl, cond, uncond, **options)

    @kernels
    @pytest.mark.parametrize("V", [4097, 102400] if INTERPRETED else [4096, 4097, 16384, 102400, 151_936])
    @dtypes
    def test_draws_what_the_reference_draws_from_true_vocabularies(self, dtype: torch.dtype, V: int, impl: str) -> None:
        cond, uncond = 1.5 * normals(2, 1 if INTERPRETED else 6, V).to(dtype)
        truncations = [{}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 2000, "top_p": 0.95}, GREEDY]
        for guidance in (1.0, 5.0):
            for truncation in truncations[guidance == 5 :: 2] if INTERPRETED else truncations:
                assert_draws_what_the_reference_draws(impl, cond, uncond, guidance=guidance, **truncation, seed=3)

    @kernels
    @dtypes
    def test_short_rows_read_nothing_around_them(self, dtype: torch.dtype, impl: str) -> None:
        """Few or no whole 16 bytes, the two rows of a guided draw at different offsets from multiples of 16 bytes."""
        for V in range(1, 18):
            logits = 1.5 * normals(2, 3, V, seed=V).to(dtype)
            cond, uncond = (amid_nan(x.to(device(impl)), left)[0] for x, left in zip(logits, (V % 8, 5), strict=True))
            for i, truncation in enumerate([{}, {"top_k": 2}, {"top_p": 0.7}, GREEDY]):
                options = {"guidance": 5.0 if i % 2 else 1.0, **truncation, "seed": 3}
                assert_alike(sample(impl, cond, uncond, **options), sample("torch", *logits, **options))

    @pytest.mark.parametrize(
        ("z", "options", "kept"),
        [
            ([0.0] * 10, {"top_k": 4}, [0, 1, 2, 3]),
            ([0.0] * 10, {"top_p": 0.35}, [0, 1, 2, 3]),
            ([0.0] * 10, {"top_k": 4, "top_p": 0.6}, [0, 1, 2]),  # of what top-k left, not of the whole
            ([0.0] * 10, {"top_k": 4, "top_p": 0.5}, [0, 1]),  # exactly half: nothing stays beyond it
            ([-0.0, 0.0, 0.5, -0.0, 0.0], {"top_k": 3}, [0, 1, 2]),  # both zeros are one
            ([0.0, -0.0, 0.5, 0.0, -0.0], {"top_k": 4, "top_p": 0.75}, [0, 1, 2]),
            ([-0.0, 0.0], GREEDY, [0]),
            ([0.0, -0.0], GREEDY, [0]),
            ([-1.0, -0.0, 0.0, -0.0], GREEDY, [1]),
            ([-1.0, 0.0, -1.0, 0.0, -1.0], {"top_k": 4, "top_p": 0.99}, [0, 1, 2, 3]),
            ([-1.0, 0.0, -1.0, 0.0, -1.0], {"top_k": 4, "top_p": 0.7}, [1, 3]),
            ([-INF, 0.0, -INF, -INF], {"top_k": 3, "top_p": 0.9}, [1]),
        ],
    )
    def test_ties_go_to_the_smaller_ids(self, z: list[float], options: dict, kept: list[int], impl: str) -> None:
        draw = sample(impl, torch.tensor(z).expand(20 if INTERPRETED else 200, -1), None, **options)
        assert draw.token.unique().tolist() == kept


def horner(x: np.float32, *coefficients: float) -> np.float32:
    """The polynomial as the documentation has it: each product and sum rounded to float32 on its own."""
    p = np.float32(coefficients[0])
    for c in coefficients[1:]:
        p = p * x + np.float32(c)
    return p


def exact_exp2(x: np.float32) -> np.float32:
    n = np.rint(x)
    coefficients = (0.000154531634, 0.00133908633, 0.00961808302, 0.0555035695, 0.240226507, 0.693147182, 1.0)
    return np.ldexp(horner(x - n, *coefficients), int(n))


def exact_exponential(bits: int) -> np.float32:
    one = np.float32(1)
    u = min((np.float32(bits) + np.float32(0.5)) / np.float32(2**32), np.float32(1 - 2**-24))
    m, exponent = np.frexp(one - u)
    q, halvings = (u, 0) if one - u >= 0.5 else (one - m, -exponent)
    p = horner(q, 1.16061389, -1.03616726, 0.75161618, 0.0508236513, 0.269662917, 0.33212924, 0.500024617, 1.0)
    return q * p + np.float32(halvings) * np.float32(0.693147182)


def test_exp2_is_two_to_the_x() -> None:
    for x in map(np.float32, (0.0, -0.3, -0.5, -1.0, -7.77, -39.9, -41.0, -126.0, 0.3, 38.4, 64.0)):
        assert float(exact_exp2(x)) == pytest.approx(2 ** float(x), rel=1.3e-7)
        assert module._exp2(torch.tensor(x)).item() == exact_exp2(x)


class TestRounding:
    """Draws that one rounding more or less in the logits or the noise would change."""

    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_times(self, temperature: float, impl: str) -> None:
        # two tokens, 11 of logit 0 and 29 where both come in together, and at the twelve floats around
        offsets, logits, expected, counter = [], [], [], 0
        scale = np.float32(math.log2(math.e) / temperature)
        while len(logits) < 13 * (5 if INTERPRETED else 300):
            counter += 1
            first, second = (exact_exponential(word(0, counter, v)) for v in (11, 29))
            if second < first:
                boundary = np.float32(math.log2(second / first) / float(scale)).view(np.int32)
                for x in (boundary + np.arange(-6, 7, dtype=np.int32)).view(np.float32):
                    offsets.append(counter)
                    logits.append(float(x))
                    expected.append(29 if second * exact_exp2(-(x * scale)) < first else 11)
        z = torch.full((len(logits), 40), -INF)
        z[:, 11], z[:, 29] = 0.0, torch.tensor(logits)
        assert 0.2 < expected.count(29) / len(expected) < 0.8
        assert sample(impl, z, None, temperature=temperature, offset=torch.tensor(offsets)).token.tolist() == expected

    @pytest.mark.parametrize("apart", [False, True])  # in one of the parts in which a GPU races, or in two
    def test_of_tokens_that_come_in_together_the_smaller_id_is_drawn(self, apart: bool, impl: str) -> None:
        noise, ids = exponential(words_of_rows(0, torch.arange(200), 6000)).sort(dim=-1, stable=True)
        offset, place = (noise[:, 1:] == noise[:, :-1]).nonzero().T
        pairs = torch.stack([ids[offset, place], ids[offset, place + 1]], dim=1)
        chosen = ((pairs[:, 0] // 2048 != pairs[:, 1] // 2048) == apart).nonzero()[: few(20), 0]
        assert len(chosen)
        z = torch.full((len(chosen), 6000), -INF).scatter_(1, pairs[chosen], 0.0)
        assert torch.equal(sample(impl, z, None, offset=offset[chosen]).token, pairs[chosen, 0])

    @pytest.mark.parametrize("options", [GREEDY, {"top_k": 1}, {"top_p": 1e-9}])
    def test_guided_logits(self, options: dict, impl: str) -> None:
        # 3·c - 2·u is the same for both tokens before rounding: what is drawn is what rounding makes the larger one
        B = 20 if INTERPRETED else 300
        c, u, t = torch.randn(3, B, generator=torch.Generator().manual_seed(0))
        cond, uncond = torch.full((2, B, 40), -INF)
        cond[:, 11], uncond[:, 11], cond[:, 29], uncond[:, 29] = c, u, c + 2 * t, u + 3 * t
        # float64 holds these sums and products exactly enough that one more rounding gives the float32 ones
        difference = (cond.double() - uncond.double()).float().double()
        separate = ((3 * difference).float().double() + uncond.double()).float()[:, [11, 29]]
        fused = (3 * difference + uncond.double()).float()[:, [11, 29]]
        assert not torch.equal(separate.argmax(1), fused.argmax(1))
        draw = sample(impl, cond, uncond, guidance=3.0, **options)
        assert draw.token.tolist() == [[11, 29][i] for i in separate.argmax(1).tolist()]


def grid(B: int, V: int, seed: int = 0) -> Tensor:
    """[B, V] float32 logits out of few values: nearly every maximum is tied."""
    return torch.randint(-4, 5, (B, V), generator=torch.Generator().manual_seed(seed)) / 2


@pytest.mark.parametrize("temperature", [0.5, 0.7, 0.9, 1.0, 1.1, 1.3, 3.0])
def test_top_k_1_is_argmax(temperature: float, impl: str) -> None:
    low = 1.5 + torch.rand(few(500) // 2, generator=torch.Generator().manual_seed(0)) / 2
    neighbours = torch.stack([low, torch.nextafter(low, torch.tensor(9.0))], dim=1)  # many are one float once scaled
    for z in (grid(few(64) // 2, 50), neighbours):
        for options in ({"top_k": 1}, {"top_p": 1e-9}):
            draw = sample(impl, z, None, temperature=temperature, **options, seed=5)
            assert draw.token.tolist() == [row.index(max(row)) for row in z.tolist()]


def test_temperature_0_is_argmax_of_the_guided_logits(impl: str) -> None:
    cond, uncond = grid(few(64), 50), grid(few(64), 50, seed=1)
    expected = [row.index(max(row)) for row in guided(cond, uncond, 5.0).tolist()]
    assert sample(impl, cond, uncond, guidance=5.0, **GREEDY).token.tolist() == expected != cond.argmax(-1).tolist()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("V", [1, 33, 1000])
def test_log_probs_are_those_of_the_whole_distributions(V: int, dtype: torch.dtype, impl: str) -> None:
    if dtype == torch.float64 and impl != "torch":
        pytest.skip("float64 is PyTorch's")
    cond, uncond = normals(2, 4, V).to(dtype)
    for options in ({"guidance": 5.0, "temperature": 0.8, "top_k": 3, "top_p": 0.9}, {"guidance": 5.0, **GREEDY}):
        draw = sample(impl, cond, uncond, **options, seed=1)
        assert draw.logp_cond.dtype == draw.logp_guided.dtype == torch.promote_types(dtype, torch.float32)
        expected = log_probs(cond, uncond, draw.token, **options)
        for ours, logp, widens in zip(draw[1:], expected, (1, 4), strict=True):  # w widens the rounding
            torch.testing.assert_close(ours.double(), logp, rtol=0, atol=widens * TOLERANCE[dtype])


LOGITS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: 3 * x,
    "peaked": lambda x: x + 60 * (torch.arange(x.shape[1]) == x.shape[1] // 2),
    "flat": lambda x: 1e-3 * x,
    "negative": lambda x: -x.abs() - 20,
    "offset": lambda x: x + 1e4,
    "negative offset": lambda x: x - 1e4,
    "tied": lambda x: x.round(),
    "masked": lambda x: x.masked_fill((x < -1) & (torch.arange(x.shape[1]) > 0), -INF),
    "wide": lambda x: 1e4 * x,
    "last": lambda x: x + 30 * (torch.arange(x.shape[1]) == x.shape[1] - 1),
}


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [33, 4097] if INTERPRETED else [1, 33, 4097])
@pytest.mark.parametrize("kind", LOGITS)
def test_log_probs_are_no_worse_than_the_references(kind: str, V: int, dtype: torch.dtype, impl: str) -> None:
    cond, uncond = (LOGITS[kind](x / 2).to(dtype) for x in normals(2, 1 if INTERPRETED else 5, V))
    for guidance, temperature in ((1.0, 1.0), (5.0, 0.7), (5.0, 0.0)):
        options = {"guidance": guidance, "temperature": temperature}
        ours, eager = (sample(which, cond, uncond, **options, seed=2) for which in (impl, "torch"))
        assert torch.equal(ours.token, eager.token)
        # float64 may draw another token: the log-probs of this one
        for name, gt in zip(Draw._fields[1:], log_probs(cond, uncond, ours.token, **options), strict=True):
            assert_no_worse(name, getattr(ours, name), getattr(eager, name), gt, 1e-6, 1e-6)


class TestInvariance:
    def test_a_row_draws_the_same_wherever_and_with_whomever(self, impl: str) -> None:
        cond, uncond = normals(2, 9, 1000)
        offset = torch.arange(9) * 977 + (3 << 32)
        options = {"guidance": 3.0, "temperature": 0.9, "top_k": 300, "top_p": 0.99, "seed": 4}
        together = sample(impl, cond, uncond, **options, offset=offset)
        assert len(set(together.token.tolist())) > 4
        for order in ([8, 3, 5, 1, 0, 2, 4, 7, 6], [4], [6, 6, 2]):
            apart = sample(impl, cond[order], uncond[order], **options, offset=offset[order])
            assert all(torch.equal(a, t[order]) for a, t in zip(apart, together, strict=True))

    def test_seed_and_offset_decide_the_draw(self, impl: str) -> None:
        z, offset = torch.zeros(few(64), 5000), torch.arange(few(64))
        one, again = (sample(impl, z, None, seed=s, offset=offset).token for s in (9, torch.tensor(9)))
        assert torch.equal(one, again)
        for seed, counters in ((10, offset), (9 + (1 << 32), offset), (9, offset + 64), (9, offset + (1 << 32))):
            other = sample(impl, z, None, seed=seed, offset=counters).token
            assert (one == other).sum() <= 2  # each by a chance of 1 in 5000

    def test_guidance_1_is_the_conditional_draw(self, impl: str) -> None:
        cond, uncond = normals(2, few(20), 100)
        uncond[:, ::7], uncond[:, 1], uncond[2] = -INF, math.nan, -INF  # none of which is read
        options = {"temperature": 0.8, "top_p": 0.9, "seed": 2}
        alone = sample(impl, cond, None, **options)
        assert all(map(torch.equal, sample(impl, cond, uncond, guidance=1.0, **options), alone))
        assert torch.equal(alone.logp_cond, alone.logp_guided)
        assert not torch.equal(sample(impl, cond, cond.flip(0), guidance=2.0, **options).token, alone.token)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_16_bit_logits_are_computed_in_float32(self, dtype: torch.dtype, impl: str) -> None:
        if dtype == torch.float16 and impl == "native":
            pytest.skip("the C++ kernel takes no float16")
        cond, uncond = normals(2, few(20), 500).to(dtype)
        options = {"guidance": 5.0, "temperature": 0.8, "top_k": 50, "seed": 2}
        ours, wide = sample(impl, cond, uncond, **options), sample(impl, cond.float(), uncond.float(), **options)
        assert_alike(ours, wide, rtol=0, atol=2e-6)

    @pytest.mark.parametrize("shifts", [(1e4, 1e4), (-1e4, -1e4), (1e4, -1e4), (-1e4, 1e4)])
    def test_large_offsets_change_nothing(self, shifts: tuple[float, float], impl: str) -> None:
        cond, uncond = (normals(2, few(20), 100) * 64).round() / 64  # so that float32 holds every sum exactly
        for guidance in (1.0, 5.0):
            ours = sample(impl, cond + shifts[0], uncond + shifts[1], guidance=guidance, seed=2)
            assert_alike(ours, sample(impl, cond, uncond, guidance=guidance, seed=2), rtol=0)

    def test_a_token_masked_by_either_row_is_never_drawn(self, impl: str) -> None:
        cond, uncond = torch.zeros(2, few(500), 6)
        cond[:, 1], uncond[:, 4], cond[:, 5], uncond[:, 5] = -INF, -INF, -INF, -INF
        for options in ({}, {"top_k": 5}, {"top_p": 0.99}, GREEDY):
            for guidance in (0.0, 0.5, 5.0):
                draw = sample(impl, cond, uncond, guidance=guidance, **options, seed=2)
                assert set(draw.token.tolist()) == ({0} if options is GREEDY else {0, 2, 3})
                assert draw.logp_guided.isfinite().all()

    @dtypes
    def test_a_mask_is_that_of_the_draw_alone(self, dtype: torch.dtype, impl: str) -> None:
        cond, mask = normals(few(40), 300).to(dtype), torch.zeros(300, dtype=dtype)
        mask[::3] = mask[290:] = -INF
        for options in ({}, TRUNCATED, GREEDY):
            ours = sample(impl, cond, None, mask=mask, **options, seed=2)
            masked = sample(impl, cond + mask, None, **options, seed=2)
            assert (mask[ours.token] == 0).all()
            logp_cond = log_probs(cond, None, ours.token, **options)[0].float()
            torch.testing.assert_close(ours.logp_cond, logp_cond, rtol=0, atol=1e-5)
            assert_alike(ours._replace(logp_cond=masked.logp_cond), masked, rtol=0, atol=2e-6)

    def test_input_is_left_alone_gets_no_gradient_and_may_be_empty(self, impl: str) -> None:
        cond, uncond = (grid(4, 9, seed=s).to(device(impl)).requires_grad_() for s in (0, 1))
        before = cond.detach().clone(), uncond.detach().clone()
        options = {"guidance": 5.0, "top_k": 3, "top_p": 0.9, "seed": 0, "impl": impl}
        draw = cfg_sample(cond, uncond, **options, offset=torch.arange(4, device=device(impl)))
        assert torch.equal(cond, before[0]) and torch.equal(uncond, before[1])
        assert not draw.logp_cond.requires_grad and not draw.logp_guided.requires_grad
        for other in (None, torch.empty(0, 7)):
            draw = sample(impl, torch.empty(0, 7), other, guidance=5.0, top_k=3, top_p=0.9)
            assert draw.token.shape == draw.logp_cond.shape == draw.logp_guided.shape == (0,)

    @pytest.mark.parametrize("impl", [NATIVE])
    def test_threads_change_no_bit(self, impl: str) -> None:
        cond, uncond = normals(2, 7, 16385) / 2
        threads = torch.get_num_threads()
        draws = []
        try:
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                draws.append(sample(impl, cond, uncond, guidance=5.0, top_k=300, top_p=0.9))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(x, y) for draw in draws[1:] for x, y in zip(draw, draws[0], strict=True))


class TestCompiler:
    @kernels
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_opcheck(self, dtype: torch.dtype, impl: str) -> None:
        cond, uncond = torch.randn(2, 3, 33, device=device(impl)).to(dtype)
        seed, offset = torch.tensor(5, device=device(impl)), torch.arange(3, device=device(impl))
        for other, top_k, top_p in ((uncond, 0, 1.0), (None, 4, 0.9)):
            arguments = (cond, other, 5.0, 0.7, top_k, top_p, seed, offset, impl)
            torch.library.opcheck(torch.ops.bicot.cfg_sample.default, arguments)

    def test_compiles_to_one_graph(self, impl: str) -> None:
        torch._dynamo.reset()  # the implementations before this one count against its recompilations
        compiled = torch.compile(cfg_sample, fullgraph=True, backend="aot_eager")
        seed = torch.tensor(3, device=device(impl))
        truncated = {"top_k": 5, "top_p": 0.9}
        for B, options in ((4, {}), (4, {"temperature": 0.0}), (4, truncated), (6, truncated)):  # 6 stands for any B
            cond, uncond = (torch.randn(B, 50, device=device(impl)) for _ in range(2))
            options |= {"guidance": 5.0, "seed": seed, "offset": torch.arange(B, device=device(impl)), "impl": impl}
            assert_alike(compiled(cond, uncond, **options), cfg_sample(cond, uncond, **options))
        if device(impl) == "cpu":
            cond[2, 7] = math.nan
            with pytest.raises(ValueError, match="^cond logits of row 2 are not finite"):
                compiled(cond, uncond, **options)


def row_2(columns: slice, value: float) -> Tensor:
    """[4, 9] zeros but for some columns of row 2."""
    z = torch.zeros(4, 9)
    z[2, columns] = value
    return z


GOOD, LAST, ALL = torch.zeros(4, 9), slice(8, 9), slice(None)
HIDING = row_2(LAST, -INF)  # hides a bad logit from the guided ones
BAD_ROWS = [
    ("cond logits of row 2 .*every token masked", row_2(ALL, -INF), None),
    ("uncond logits of row 2 .*every token masked", row_2(slice(2), -INF), row_2(ALL, -INF)),
    ("guided logits of row 2 .*every token masked", row_2(slice(2), -INF), row_2(slice(2, 9), -INF)),
    ("guided logits of row 0 .*not finite", torch.full((4, 9), 3e38), torch.full((4, 9), -3e38)),  # the mix overflows
]
for _bad in (row_2(LAST, math.nan), row_2(LAST, INF)):
    BAD_ROWS += [("cond logits of row 2 are not finite", _bad, uncond) for uncond in (None, GOOD, HIDING)]
    BAD_ROWS += [("uncond logits of row 2 are not finite", cond, _bad) for cond in (GOOD, HIDING)]


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.9}, {"top_k": 5, "top_p": 0.9}, GREEDY])
def test_a_row_without_an_answer_is_named(options: dict, impl: str) -> None:
    if device(impl) == "cuda":
        pytest.skip("an assertion on the device")
    for (message, cond, uncond), guidance in itertools.product(BAD_ROWS, (5.0,) if INTERPRETED else (5.0, -1.0)):
        with pytest.raises(ValueError, match="^" + message):
            sample(impl, cond, uncond, guidance=guidance, **options)


@gpu
class TestOnAGpu:
    @pytest.mark.parametrize("impl", ["triton", "torch"])
    @pytest.mark.parametrize("bad", ["nan", "inf"])
    def test_a_bad_row_is_an_assertion_on_a_gpu(self, bad: str, impl: str) -> None:
        for value, fails in (("1.0", False), (bad, True)):
            script = f"""
import torch
from bicot.kernels.cfg_sample import cfg_sample
z = torch.zeros(4, 9, device="cuda")
z[2, 8] = float("{value}")
cfg_sample(z, z.flip(0), guidance=5.0, seed=0, offset=torch.arange(4, device="cuda"), impl="{impl}")
torch.cuda.synchronize()
"""
            # in a process of its own: a device-side assertion leaves CUDA unusable
            result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
            assert (result.returncode != 0) == fails, result.stderr
            assert ("device-side assert" in result.stderr) == fails

    def test_a_cuda_graph_draws_anew_with_each_replay(self) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        cond, uncond = torch.randn(2, 16, 16384, device="cuda", generator=generator).bfloat16()
        seed, offset = torch.tensor(3, device="cuda"), torch.arange(16, device="cuda")
        for options in ({}, {"top_k": 50, "top_p": 0.9}, {"temperature": 0.0}):
            options |= {"guidance": 5.0, "seed": seed, "offset": offset, "impl": "triton"}
            cfg_sample(cond, uncond, **options)  # compiles
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                draw = cfg_sample(cond, uncond, **options)
            for step in range(3):
                seed.fill_(step)
                offset.add_(1)
                graph.replay()
                expected = cfg_sample(cond, uncond, **options)
                assert all(map(torch.equal, draw, expected))

    def test_nothing_waits_for_the_device_and_nothing_compiles_again(self) -> None:
        from triton import knobs

        def step(B: int, V: int, seed: int, guidance: float, temperature: float, top_k: int, top_p: float) -> None:
            cond, uncond = torch.randn(2, B, V, device="cuda").bfloat16()
            options = {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p}
            cfg_sample(cond, uncond, **options, seed=seed, offset=torch.arange(B, device="cuda"), impl="triton")

        step(16, 16384, 0, 5.0, 1.0, 50, 0.9)
        compiled: list[str] = []
        knobs.compilation.listener = lambda **event: compiled.append(str(event.get("src")))
        try:
            with no_host_sync():
                step(7, 102400, 1, 3.0, 0.7, 1, 1e-9)
                step(300, 256, 2**40, 0.0, 1.3, 16, 0.5)
        finally:
            knobs.compilation.listener = None
        assert not compiled

    def test_more_elements_than_a_32_bit_offset_reaches(self) -> None:
        B, V = 24_000, 102_400  # 2.5e9 logits, 4.9 GB
        cond = torch.randn(B, V, device="cuda", dtype=torch.bfloat16)
        ours = cfg_sample(cond, None, seed=0, offset=torch.arange(B, device="cuda"), impl="triton")
        last = cfg_sample(cond[-3:], None, seed=0, offset=torch.arange(B - 3, B, device="cuda"), impl="torch")
        assert torch.equal(ours.token[-3:], last.token)
        torch.testing.assert_close(ours.logp_cond[-3:], last.logp_cond, rtol=1e-6, atol=1e-5)


Z, OFFSET = torch.zeros(2, 5), torch.arange(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cond": Z[0]}, r"cond \[B, V\] \(5,\), uncond None and offset \[B\] \(2,\) differ"),
        ({"uncond": Z[:1]}, r"cond \[B, V\] \(2, 5\), uncond \(1, 5\) and offset \[B\] \(2,\) differ"),
        ({"offset": OFFSET[:1]}, r"cond \[B, V\] \(2, 5\), uncond None and offset \[B\] \(1,\) differ"),
        ({"offset": OFFSET.int()}, "offset must be int64 counters, got torch.int32"),
        ({"temperature": -0.1}, r"out of range: .*temperature=-0.1 \(>= 0, finite\)"),
        ({"temperature": math.nan}, "out of range: .*temperature=nan"),
        ({"temperature": INF}, "out of range: .*temperature=inf"),
        ({"top_k": -1}, r"out of range: .*top_k=-1 \(>= 0\)"),
        ({"top_p": 0.0}, r"out of range: .*top_p=0.0 \(0, 1\]"),
        ({"top_p": 1.1}, "out of range: .*top_p=1.1"),
        ({"top_p": math.nan}, "out of range: .*top_p=nan"),
        ({"uncond": Z, "guidance": math.nan}, r"out of range: guidance=nan \(finite\)"),
        ({"cond": Z[:, :1].expand(2, 2**23)}, "a vocabulary has 1 to 8388607 tokens, got V = 8388608"),
        ({"cond": torch.zeros(2, 0)}, "a vocabulary has 1 to 8388607 tokens, got V = 0"),
        ({"uncond": Z.bfloat16()}, r"must share a floating dtype, got \[torch.float32, torch.bfloat16\]"),
        ({"cond": Z.long()}, r"must share a floating dtype, got \[torch.int64\]"),
        ({"offset": OFFSET.to("meta")}, r"must share a device, got \['cpu', 'meta'\]"),
        ({"seed": torch.zeros(2).long()}, r"seed must be an int or one int64, got \(2,\) torch.int64"),
        ({"seed": torch.tensor(1.0)}, r"seed must be an int or one int64, got \(\) torch.float32"),
        ({"cond": Z.double(), "impl": "native"}, 'impl="native" cannot run here'),
        ({"impl": "cuda"}, 'impl must be "auto"'),
        ({"uncond": Z, "mask": Z[0]}, r"mask must be \[V\] = \[5\], without uncond, got \[5\]"),
        ({"mask": Z}, r"mask must be \[V\] = \[5\], without uncond, got \[2, 5\]"),
    ],
)
def test_bad_input_is_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cfg_sample(**{"cond": Z, "uncond": None, "seed": 0, "offset": OFFSET, **options})
