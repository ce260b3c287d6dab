"""cfg_sample against plain Python floats: the exact distribution, the token that u chooses, Philox by its vectors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bicot.kernels import cfg_sample as module
from bicot.kernels.cfg_sample import cfg_sample, philox_uniform

# absolute, of a log-prob: a float32 log-sum-exp of terms near 1; float64 is there for the tests of the formula
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}
INF = math.inf
U_MIN, U_MAX = 2**-25, 1 - 2**-25  # what 24 bits can hold


def philox4x32(counter: list[int], key: list[int]) -> list[int]:
    """Ten rounds, from the paper's figure, in unbounded integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        hi0, lo0 = divmod(0xD2511F53 * c0, 2**32)
        hi1, lo1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def uniform(seed: int, offset: int) -> float:
    words = [v >> shift & 0xFFFFFFFF for v in (offset % 2**64, seed % 2**64) for shift in (0, 32)]
    return ((philox4x32([*words[:2], 0, 0], words[2:])[0] >> 8) + 0.5) / 2**24


def guided_logits(cond: list[float], uncond: list[float] | None, guidance: float) -> list[float]:
    if uncond is None or guidance == 1:
        return cond
    return [-INF if -INF in (c, u) else u + guidance * (c - u) for c, u in zip(cond, uncond, strict=True)]


def softmax(z: list[float], temperature: float = 1.0) -> list[float]:
    top = max(z)
    e = [math.exp((v - top) / temperature) for v in z]
    return [v / math.fsum(e) for v in e]


def log_softmax(z: list[float], temperature: float, v: int) -> float:
    top = max(z)
    return (z[v] - top) / temperature - math.log(math.fsum(math.exp((x - top) / temperature) for x in z))


def distribution(z: list[float], temperature: float, top_k: int = 0, top_p: float = 1.0) -> list[float]:
    """What is drawn from: softmax, top-k, then top-p, ties to the smaller id."""
    order = sorted(range(len(z)), key=lambda v: (-z[v], v))[: top_k or None]
    probs = softmax([z[v] for v in order], temperature)
    kept, mass = {}, 0.0
    for v, p in zip(order, probs, strict=True):
        if mass < top_p:
            kept[v] = p
        mass += p
    return [kept.get(v, 0.0) / math.fsum(kept.values()) for v in range(len(z))]


def masses_before(z: list[float], temperature: float, top_k: int) -> list[float]:
    probs = sorted(distribution(z, temperature, top_k), reverse=True)
    return [math.fsum(probs[:i]) for i in range(len(probs))]


def normal(V: int, spread: float = 2.0, seed: int = 0) -> list[float]:
    """V float32 logits."""
    return (spread * torch.randn(V, generator=torch.Generator().manual_seed(seed))).tolist()


class TestPhilox:
    def test_the_oracle_gives_random123s_published_vectors(self) -> None:
        ones = 0xFFFFFFFF
        assert philox4x32([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
        assert philox4x32([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
        pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
        assert philox4x32(pi, [0xA4093822, 0x299F31D0]) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]

    def test_the_published_vector_of_zeros(self) -> None:
        assert philox_uniform(0, torch.tensor([0])).item() == ((0x6627E8D5 >> 8) + 0.5) / 2**24

    @settings(deadline=None, max_examples=200)
    @given(st.integers(-(2**63), 2**63 - 1), st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5))
    def test_equals_the_oracle_for_any_key_and_counter(self, seed: int, offsets: list[int]) -> None:
        assert philox_uniform(seed, torch.tensor(offsets)).tolist() == [uniform(seed, o) for o in offsets]

    @pytest.mark.parametrize("word", [0, 2**32 - 1, 2**31, 2**63 - 1, -1, -(2**63)])
    def test_edges_of_words(self, word: int) -> None:
        for seed, offset in ((word, 0), (0, word), (word, word)):
            assert philox_uniform(seed, torch.tensor(offset)).item() == uniform(seed, offset)

    def test_seed_as_a_tensor_and_any_shape(self) -> None:
        offset = torch.arange(6).view(2, 3) + (5 << 32)
        u = philox_uniform(-7, offset)
        assert u.shape == (2, 3) and u.dtype == torch.float64 and u.min() > 0 and u.max() < 1
        assert torch.equal(u, philox_uniform(torch.tensor(-7), offset))

    def test_uniform(self) -> None:
        # 2^16 draws, as the engine counts them: sample << 32 | token. 256 cells of 256
        offset = ((torch.arange(256) << 32)[:, None] + torch.arange(256)).flatten()
        cells = (philox_uniform(1, offset) * 256).long()
        assert_drawn_from(cells, [1 / 256] * 256)


def assert_drawn_from(token: Tensor, probs: list[float]) -> None:
    """Chi-square at one in a million (seeds are fixed: it passes always or never); no token of probability 0."""
    counts, N = torch.bincount(token, minlength=len(probs)).tolist(), len(token)
    assert len(counts) == len(probs)
    cells, rest_count, rest = [], 0, 0.0
    for count, p in zip(counts, probs, strict=True):
        assert p > 0 or count == 0
        if N * p >= 8:
            cells.append((count, N * p))
        else:
            rest_count, rest = rest_count + count, rest + N * p
    if rest > 8:
        cells.append((rest_count, rest))
    else:
        assert rest_count < 40  # Poisson of mean 8 at most
    df = len(cells) - 1
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells)
    # Wilson and Hilferty's quantile of chi-square at 4.75 standard deviations
    assert statistic <= df * (1 - 2 / (9 * df) + 4.75 * math.sqrt(2 / (9 * df))) ** 3 if df else statistic < 1e-3


N_DRAWS = 20_000
PEAKED = [v + 12.0 * (i == 13) for i, v in enumerate(normal(40))]
WITH_MASK = [-INF if i % 3 == 0 else v for i, v in enumerate(normal(40))]
NO_GUIDANCE: tuple[None, float] = (None, 1.0)
UNCOND = [c - 0.4 * d for c, d in zip(normal(40), normal(40, seed=1), strict=True)]  # w = 5 makes about normal(40)·2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("cond", "uncond", "guidance", "temperature", "top_k", "top_p"),
    [
        ([0.0] * 50, *NO_GUIDANCE, 1.0, 0, 1.0),
        (normal(40), *NO_GUIDANCE, 1.0, 0, 1.0),
        (normal(40), *NO_GUIDANCE, 0.6, 0, 1.0),
        (normal(40), *NO_GUIDANCE, 1.7, 0, 1.0),
        (PEAKED, *NO_GUIDANCE, 1.0, 0, 1.0),
        (WITH_MASK, *NO_GUIDANCE, 1.0, 0, 1.0),
        (normal(40), *NO_GUIDANCE, 1.0, 7, 1.0),
        ([0.0] * 50, *NO_GUIDANCE, 1.0, 7, 1.0),
        (normal(40), *NO_GUIDANCE, 1.7, 0, 0.83),
        (normal(40), *NO_GUIDANCE, 1.7, 12, 0.83),
        (normal(40), UNCOND, 5.0, 1.0, 0, 1.0),
        (normal(40), UNCOND, 5.0, 1.3, 9, 0.83),
        (normal(40), UNCOND, 0.0, 1.0, 0, 1.0),
        (WITH_MASK, UNCOND, 5.0, 1.0, 0, 1.0),
        (UNCOND, WITH_MASK, 5.0, 1.0, 0, 0.83),
        (normal(2000, 1.0), *NO_GUIDANCE, 1.0, 0, 1.0),
    ],
)
def test_draws_follow_the_exact_distribution(
    cond: list[float],
    uncond: list[float] | None,
    guidance: float,
    temperature: float,
    top_k: int,
    top_p: float,
    dtype: torch.dtype,
) -> None:
    rows, others = (None if x is None else torch.tensor(x).to(dtype) for x in (cond, uncond))
    z = guided_logits(rows.tolist(), None if others is None else others.tolist(), guidance)
    expand = [None if x is None else x.expand(N_DRAWS // (len(cond) // 1000 + 1), -1) for x in (rows, others)]
    options = {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    token = cfg_sample(*expand, **options, seed=11, offset=torch.arange(len(expand[0]))).token
    assert token.dtype == torch.int64
    assert_drawn_from(token, distribution(z, temperature, top_k, top_p))


def test_the_chi_square_finds_a_wrong_temperature() -> None:
    token = cfg_sample(torch.tensor(normal(40)).expand(N_DRAWS, -1), None, seed=11, offset=torch.arange(N_DRAWS)).token
    with pytest.raises(AssertionError):
        assert_drawn_from(token, distribution(normal(40), 1.1))


quarters = st.integers(-24, 24).map(lambda i: i / 4)  # exact in float32 under any guidance here, and often tied


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[float], list[float] | None, float]:
    """(cond, uncond, guidance)"""
    V = draw(st.integers(1, 30))
    values = st.lists(quarters | st.just(-INF), min_size=V, max_size=V)
    return draw(values), draw(st.none() | values), draw(st.sampled_from([0.0, 0.5, 1.0, 2.0, 5.0]))


@settings(deadline=None, max_examples=150)
@given(
    rows(),
    st.sampled_from([0.3, 0.7, 1.0, 1.9]),
    st.integers(0, 40),
    st.just(1.0) | st.floats(0.01, 1.0),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 2**63 - 1),
)
def test_draws_the_token_that_u_chooses(
    row: tuple, temperature: float, top_k: int, top_p: float, seed: int, offset: int
) -> None:
    cond, uncond, guidance = row
    z = guided_logits(cond, uncond, guidance)
    assume(max(z) > -INF and max(uncond or [0.0]) > -INF)
    assume(all(abs(mass - top_p) > 1e-5 for mass in masses_before(z, temperature, top_k)))
    tensors = [None if x is None else torch.tensor([x]) for x in (cond, uncond)]
    options = {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    draw = cfg_sample(*tensors, **options, seed=seed, offset=torch.tensor([offset]))

    token = int(draw.token)
    q = distribution(z, temperature, top_k, top_p)
    assert q[token] > 0
    u = uniform(seed, offset)
    assert math.fsum(q[:token]) - 1e-5 <= u <= math.fsum(q[: token + 1]) + 1e-5
    assert draw.logp_guided.item() == pytest.approx(log_softmax(z, temperature, token), abs=TOLERANCE[torch.float32])
    assert draw.logp_cond.item() == pytest.approx(log_softmax(cond, temperature, token), abs=TOLERANCE[torch.float32])


@pytest.mark.parametrize("u", [0.0, U_MIN, U_MAX, math.nextafter(1.0, 0.0)])
@pytest.mark.parametrize("truncation", [{}, {"top_k": 5}, {"top_p": 0.89}])
def test_extreme_u_draws_a_possible_token(u: float, truncation: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "philox_uniform", lambda seed, offset: torch.full(offset.shape, u, dtype=torch.float64))
    ends_masked = [-INF] * 3 + normal(30) + [-INF] * 3
    ends_impossible = [-2000.0] * 3 + normal(30) + [-2000.0] * 3  # probability underflows to 0
    for z in (ends_masked, ends_impossible, normal(30), [0.0] * 30, PEAKED, [0.0]):
        draw = cfg_sample(torch.tensor([z]), None, **truncation, seed=0, offset=torch.zeros(1, dtype=torch.int64))
        q = distribution(z, 1.0, truncation.get("top_k", 0), truncation.get("top_p", 1.0))
        possible = [v for v, p in enumerate(q) if p > 0]
        assert int(draw.token) in possible and draw.logp_guided.isfinite()
        end = possible[0 if u < 0.5 else -1]
        assert int(draw.token) == end or q[end] < 1e-7  # which u's 24 bits may pass by


@pytest.mark.parametrize("V", [1, 2, 16384, 16385, 102400])
def test_a_flat_row_maps_u_onto_the_vocabulary(V: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = [(k, part) for k in (0, V // 3, V // 2, V - 1) for part in (0.01, 0.5, 0.99)]
    if V & (V - 1) == 0:  # where every sum is exact, u·V = k is already token k
        inside += [(V // 2, 0.0), (V - 1, 0.0)]
    us = torch.tensor([(k + part) / V for k, part in inside], dtype=torch.float64)
    monkeypatch.setattr(module, "philox_uniform", lambda seed, offset: us)
    draw = cfg_sample(torch.full((len(us), V), -3.5), None, seed=0, offset=torch.arange(len(us)))
    assert draw.token.tolist() == [k for k, _ in inside]
    torch.testing.assert_close(draw.logp_cond, torch.full((len(us),), -math.log(V)))


def grid(B: int, V: int, seed: int = 0) -> Tensor:
    """[B, V] float32 logits out of few values: nearly every maximum is tied."""
    return torch.randint(-4, 5, (B, V), generator=torch.Generator().manual_seed(seed)) / 2


class TestGreedy:
    @pytest.mark.parametrize("temperature", [0.5, 0.7, 1.0, 3.0])
    def test_top_k_1_is_argmax_even_where_tied(self, temperature: float) -> None:
        z = grid(64, 50)
        first = [row.index(max(row)) for row in z.tolist()]
        draw = cfg_sample(z, None, temperature=temperature, top_k=1, seed=5, offset=torch.arange(64))
        assert draw.token.tolist() == first
        tiny = cfg_sample(z, None, temperature=temperature, top_p=1e-9, seed=5, offset=torch.arange(64))
        assert tiny.token.tolist() == first

    @pytest.mark.parametrize("temperature", [0.7, 0.9, 1.1, 1.3])
    def test_top_k_1_tells_neighbouring_floats_apart(self, temperature: float) -> None:
        # times 1 / temperature many of these pairs round to one float
        low = 1.5 + torch.rand(500, generator=torch.Generator().manual_seed(0)) / 2
        pairs = torch.stack([low, torch.nextafter(low, torch.tensor(9.0))], dim=1)
        draw = cfg_sample(pairs, None, temperature=temperature, top_k=1, seed=0, offset=torch.arange(500))
        assert draw.token.eq(1).all()

    def test_temperature_0_is_argmax_of_the_guided_logits(self) -> None:
        cond, uncond = grid(64, 50), grid(64, 50, seed=1)
        expected = []
        for c, u in zip(cond.tolist(), uncond.tolist(), strict=True):
            z = guided_logits(c, u, 5.0)
            expected.append(z.index(max(z)))
        draw = cfg_sample(cond, uncond, guidance=5.0, temperature=0.0, seed=0, offset=torch.arange(64))
        assert draw.token.tolist() == expected
        assert expected != cond.argmax(-1).tolist()
        for row, token in enumerate(expected):
            c, u = cond[row].tolist(), uncond[row].tolist()
            assert draw.logp_cond[row].item() == pytest.approx(log_softmax(c, 1.0, token), abs=1e-5)
            logp = log_softmax(guided_logits(c, u, 5.0), 1.0, token)
            assert draw.logp_guided[row].item() == pytest.approx(logp, abs=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("V", [1, 33, 1000])
def test_log_probs_are_those_of_the_whole_distributions(V: int, dtype: torch.dtype) -> None:
    cond, uncond = (torch.tensor([normal(V, seed=10 * s + i) for i in range(4)]).to(dtype) for s in (1, 2))
    options = {"guidance": 5.0, "temperature": 0.8, "top_k": 3, "top_p": 0.9}
    draw = cfg_sample(cond, uncond, **options, seed=1, offset=torch.arange(4))
    assert draw.logp_cond.dtype == draw.logp_guided.dtype == torch.promote_types(dtype, torch.float32)
    for row, token in enumerate(draw.token.tolist()):
        c, u = cond[row].tolist(), uncond[row].tolist()
        assert draw.logp_cond[row].item() == pytest.approx(log_softmax(c, 0.8, token), abs=TOLERANCE[dtype])
        logp = log_softmax(guided_logits(c, u, 5.0), 0.8, token)
        assert draw.logp_guided[row].item() == pytest.approx(logp, abs=4 * TOLERANCE[dtype])  # w widens the rounding


def test_a_row_draws_the_same_wherever_and_with_whomever() -> None:
    cond, uncond = (torch.tensor([normal(1000, seed=10 * s + i) for i in range(9)]) for s in (1, 2))
    offset = torch.arange(9) * 977 + (3 << 32)
    options = {"guidance": 3.0, "temperature": 0.9, "top_k": 300, "top_p": 0.99, "seed": 4}
    together = cfg_sample(cond, uncond, **options, offset=offset)
    assert len(set(together.token.tolist())) > 4
    for order in ([8, 3, 5, 1, 0, 2, 4, 7, 6], [4], [6, 6, 2]):
        apart = cfg_sample(cond[order], uncond[order], **options, offset=offset[order])
        assert all(torch.equal(a, t[order]) for a, t in zip(apart, together, strict=True))


def test_seed_and_offset_decide_the_draw() -> None:
    z, offset = torch.zeros(64, 5000), torch.arange(64)
    one, again = (cfg_sample(z, None, seed=s, offset=offset).token for s in (9, torch.tensor(9)))
    assert torch.equal(one, again)
    for seed, counters in ((10, offset), (9 + (1 << 32), offset), (9, offset + 64), (9, offset + (1 << 32))):
        other = cfg_sample(z, None, seed=seed, offset=counters).token
        assert (one == other).sum() <= 2  # of 64, each by a chance of 1 in 5000


def test_guidance_1_is_the_conditional_draw() -> None:
    cond, uncond = (torch.tensor([normal(100, seed=10 * s + i) for i in range(20)]) for s in (1, 2))
    uncond[:, ::7] = -INF
    options = {"temperature": 0.8, "top_p": 0.9, "seed": 2, "offset": torch.arange(20)}
    alone = cfg_sample(cond, None, **options)
    assert all(map(torch.equal, cfg_sample(cond, uncond, guidance=1.0, **options), alone))
    assert torch.equal(alone.logp_cond, alone.logp_guided)
    assert not torch.equal(cfg_sample(cond, cond.flip(0), guidance=2.0, **options).token, alone.token)


def test_bfloat16_logits_are_computed_in_float32() -> None:
    cond, uncond = (torch.tensor([normal(500, seed=10 * s + i) for i in range(20)]).bfloat16() for s in (1, 2))
    options = {"guidance": 5.0, "temperature": 0.8, "top_k": 50, "seed": 2, "offset": torch.arange(20)}
    ours, wide = cfg_sample(cond, uncond, **options), cfg_sample(cond.float(), uncond.float(), **options)
    assert all(map(torch.equal, ours, wide))


@pytest.mark.parametrize(("shift_c", "shift_u"), [(1e4, 1e4), (-1e4, -1e4), (1e4, -1e4), (-1e4, 1e4)])
def test_large_offsets_change_nothing(shift_c: float, shift_u: float) -> None:
    # in 64ths, so that float32 holds every sum exactly
    cond, uncond = ((torch.tensor([normal(100, seed=s + i) for i in range(20)]) * 64).round() / 64 for s in (0, 50))
    for guidance in (1.0, 5.0):
        options = {"guidance": guidance, "seed": 2, "offset": torch.arange(20)}
        ours, expected = cfg_sample(cond + shift_c, uncond + shift_u, **options), cfg_sample(cond, uncond, **options)
        assert torch.equal(ours.token, expected.token)
        torch.testing.assert_close(ours[1:], expected[1:], rtol=0, atol=TOLERANCE[torch.float32])


def test_a_token_masked_by_either_row_is_never_drawn() -> None:
    cond, uncond = torch.zeros(500, 6), torch.zeros(500, 6)
    cond[:, 1], uncond[:, 4], cond[:, 5], uncond[:, 5] = -INF, -INF, -INF, -INF
    for options in ({}, {"top_k": 5}, {"top_p": 0.99}, {"temperature": 0.0}):
        for guidance in (0.0, 0.5, 5.0):
            draw = cfg_sample(cond, uncond, guidance=guidance, **options, seed=0, offset=torch.arange(500))
            expected = {0} if "temperature" in options else {0, 2, 3}
            assert set(draw.token.tolist()) == expected and draw.logp_guided.isfinite().all()


def test_no_rows() -> None:
    for uncond in (None, torch.empty(0, 7)):
        draw = cfg_sample(torch.empty(0, 7), uncond, guidance=5.0, top_k=3, seed=0, offset=torch.empty(0).long())
        assert draw.token.shape == draw.logp_cond.shape == draw.logp_guided.shape == (0,)


def test_input_is_left_alone() -> None:
    cond, uncond = grid(4, 9), grid(4, 9, seed=1)
    before = cond.clone(), uncond.clone()
    cfg_sample(cond, uncond, guidance=5.0, top_k=3, top_p=0.9, seed=0, offset=torch.arange(4))
    assert torch.equal(cond, before[0]) and torch.equal(uncond, before[1])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("truncation", [{}, {"top_k": 2}, {"top_p": 0.9}])
@pytest.mark.parametrize("bad", [math.nan, INF])
def test_a_row_that_is_not_finite_is_named(bad: float, truncation: dict, temperature: float) -> None:
    options = {"temperature": temperature, **truncation, "seed": 0, "offset": torch.arange(4)}
    good, broken = torch.zeros(4, 9), torch.zeros(4, 9)
    broken[2, 8] = bad
    with pytest.raises(ValueError, match="^cond logits of row 2 are not finite"):
        cfg_sample(broken, None, **options)
    with pytest.raises(ValueError, match="^cond logits of row 2 are not finite"):
        cfg_sample(broken, good, guidance=5.0, **options)
    with pytest.raises(ValueError, match="^uncond logits of row 2 are not finite"):
        cfg_sample(good, broken, guidance=5.0, **options)


def test_a_row_without_a_token_is_named() -> None:
    options = {"seed": 0, "offset": torch.arange(2)}
    masked, left, right = torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2, 4)
    masked[1], left[1, :2], right[1, 2:] = -INF, -INF, -INF
    with pytest.raises(ValueError, match="cond logits of row 1 .*every token masked"):
        cfg_sample(masked, None, **options)
    with pytest.raises(ValueError, match="guided logits of row 1 .*every token masked"):
        cfg_sample(left, right, guidance=5.0, **options)


Z, OFFSET = torch.zeros(2, 5), torch.arange(2)


@pytest.mark.parametrize(
    ("cond", "uncond", "offset", "options", "message"),
    [
        (Z[0], None, OFFSET, {}, r"cond \[B, V\] \(5,\), uncond None and offset \[B\] \(2,\) differ"),
        (Z, Z[:1], OFFSET, {}, r"cond \[B, V\] \(2, 5\), uncond \(1, 5\) and offset \[B\] \(2,\) differ"),
        (Z, None, OFFSET[:1], {}, r"cond \[B, V\] \(2, 5\), uncond None and offset \[B\] \(1,\) differ"),
        (Z, None, OFFSET.int(), {}, "offset must be int64 counters, got torch.int32"),
        (Z, None, OFFSET, {"temperature": -0.1}, r"out of range: .*temperature=-0.1 \(>= 0, finite\)"),
        (Z, None, OFFSET, {"temperature": math.nan}, "out of range: .*temperature=nan"),
        (Z, None, OFFSET, {"temperature": INF}, "out of range: .*temperature=inf"),
        (Z, None, OFFSET, {"top_k": -1}, r"out of range: .*top_k=-1 \(>= 0\)"),
        (Z, None, OFFSET, {"top_p": 0.0}, r"out of range: .*top_p=0.0 \(0, 1\]"),
        (Z, None, OFFSET, {"top_p": 1.1}, "out of range: .*top_p=1.1"),
        (Z, None, OFFSET, {"top_p": math.nan}, "out of range: .*top_p=nan"),
        (Z, Z, OFFSET, {"guidance": math.nan}, r"out of range: guidance=nan \(finite\)"),
    ],
)
def test_bad_input_is_named(cond: Tensor, uncond: Tensor | None, offset: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cfg_sample(cond, uncond, **options, seed=0, offset=offset)
