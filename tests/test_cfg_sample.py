"""What cfg_sample draws: the exact distribution, the token that comes in first, Philox by its vectors; and the same
tokens, bit for bit, by all implementations."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import (
    NATIVE,
    amid_nan,
    device,
)
from sampling import (
    EXAMPLES,
    GREEDY,
    INF,
    INT64,
    LEAST,
    MARKS,
    MOST,
    TOLERANCE,
    assert_alike,
    assert_draws_what_the_reference_draws,
    dtypes,
    few,
    guided,
    kernels,
    log_probs,
    normals,
    sample,
)
from torch import Tensor

from bicot.kernels import cfg_sample as module
from bicot.kernels.cfg_sample import exponential, philox
from bicot.kernels.dispatch import INTERPRETED

pytestmark = MARKS


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


class TestPhilox:
    def test_the_oracle_gives_random123s_published_vectors(self) -> None:
        ones = 0xFFFFFFFF
        assert philox4x32([0] * 4, [0] * 2, 10) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
        assert philox4x32([0] * 4, [0] * 2) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
        assert philox4x32([ones] * 4, [ones] * 2, 10) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
        pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
        assert philox4x32(pi, [0xA4093822, 0x299F31D0], 10) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]

    @settings(max_examples=200)
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


@settings(max_examples=EXAMPLES)
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
    B = draw(st.integers(1, 2 if INTERPRETED else 5))
    V = draw(st.integers(1, 70) | st.integers(1000, 2100) | st.integers(4090, 4200))  # truncating holds 4096 at a time
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
    @settings(max_examples=2 * EXAMPLES)
    @given(problems())
    def test_draws_what_the_reference_draws(self, impl: str, problem: tuple) -> None:
        cond, uncond, options = problem
        z = guided(cond.float(), uncond if uncond is None else uncond.float(), options["guidance"])
        assume(z.amax(-1).isfinite().all())
        # log-probs reach 1e4 at the lowest temperatures, where float32 has 3 digits
        assert_draws_what_the_reference_draws(impl, cond, uncond, **options)

    @kernels
    @pytest.mark.parametrize("V", [4097, 16385] if INTERPRETED else [4096, 4097, 16384, 102400, 151_936])
    @dtypes
    def test_draws_what_the_reference_draws_from_long_rows(self, dtype: torch.dtype, V: int, impl: str) -> None:
        cond, uncond = 1.5 * normals(2, 1 if INTERPRETED else 6, V).to(dtype)
        truncations = [{}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 2000, "top_p": 0.95}, GREEDY]
        for guidance in (1.0, 5.0):
            for truncation in truncations[guidance == 5 :: 2] if INTERPRETED else truncations:
                assert_draws_what_the_reference_draws(impl, cond, uncond, guidance=guidance, **truncation, seed=3)

    @kernels
    @dtypes
    def test_short_rows_read_nothing_around_them(self, dtype: torch.dtype, impl: str) -> None:
        """Few or no whole 16 bytes, the two rows of a guided draw at different offsets from multiples of 16 bytes."""
        for V in (1, 7, 8, 9, 17) if INTERPRETED else range(1, 18):
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
