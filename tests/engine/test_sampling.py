import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from fewfire.errors import FewfireError
from fewfire.sampling import Sampler, Sampling, _draw, candidates, largest, penalised

RNG = np.random.default_rng(0)


def logits_of(n: int, scale: float = 3.0) -> np.ndarray:
    return (RNG.standard_normal(n) * scale).astype(np.float32)


def plain(logits: np.ndarray, s: Sampling, history: list[int]) -> dict[int, float]:
    """The same filters, each over the whole vocabulary, as transformers writes them."""
    x = logits.astype(np.float64)
    for i in set(history):
        x[i] = x[i] * s.repetition_penalty if x[i] < 0 else x[i] / s.repetition_penalty
    x = x / s.temperature
    if s.top_k:
        x[x < np.sort(x)[-min(s.top_k, len(x))]] = -np.inf
    if s.top_p < 1:
        order = np.argsort(x)
        p = np.exp(x[order] - x.max())
        x[order[:-1][(np.cumsum(p / p.sum()) <= 1 - s.top_p)[:-1]]] = -np.inf
    p = np.exp(x - x.max())
    p[p < s.min_p] = 0
    p /= p.sum()
    return {int(i): float(p[i]) for i in np.flatnonzero(p)}


def distribution(s: Sampling, logits: np.ndarray, history: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that a sampler may pick and their probabilities."""
    ids, weights = candidates(penalised(logits, history, s.repetition_penalty), s)
    return ids, weights / weights.sum(dtype=np.float64)


@pytest.mark.parametrize("vocab", [1, 7, 300, 49152])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.5, top_k=40),
        Sampling(temperature=1.3, top_p=0.9),
        Sampling(temperature=5.0, top_p=0.999),
        Sampling(temperature=0.8, top_k=50, top_p=0.95, min_p=0.05, repetition_penalty=1.2),
        Sampling(temperature=0.8, min_p=0.1, repetition_penalty=0.8),
        Sampling(temperature=2.0, top_k=1000),
    ],
    ids=str,
)
def test_distribution_equals_the_plain_filters(vocab, sampling):
    logits, history = logits_of(vocab), [0, vocab // 2, 0]
    ids, p = distribution(sampling, logits, history)
    expected = plain(logits, sampling, history)
    assert set(ids.tolist()) == set(expected)
    np.testing.assert_allclose(p, [expected[int(i)] for i in ids], rtol=2e-4, atol=1e-9)


def test_frequencies_follow_the_distribution():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    sampler = Sampler(Sampling(temperature=1.0, seed=1))
    counts = Counter(sampler.pick(logits) for _ in range(20_000))
    np.testing.assert_allclose([counts[i] / 20_000 for i in range(4)], np.exp(logits), atol=0.015)


def test_draw_matches_one_running_sum():
    weights = RNG.random(5000).astype(np.float32) * (RNG.random(5000) < 0.3)
    edges = np.cumsum(weights, dtype=np.float64)
    for u in [0.0, *RNG.random(200), np.nextafter(1.0, 0.0)]:
        drawn = _draw(weights, u)
        assert weights[drawn] > 0
        assert edges[drawn] - weights[drawn] - 1e-6 <= u * edges[-1] <= edges[drawn] + 1e-6


def test_greedy_takes_the_best_and_the_first_of_equals():
    assert Sampler(Sampling()).pick(np.array([1.0, 5.0, 5.0, 2.0], dtype=np.float32)) == 1
    assert Sampler(Sampling(temperature=1e-9)).pick(np.array([1.0, 5.0, 4.9999], dtype=np.float32)) == 1


def test_penalty_moves_both_signs_away_and_leaves_the_logits_alone():
    logits = np.array([2.0, 1.9, -1.0], dtype=np.float32)
    sampler = Sampler(Sampling(repetition_penalty=1.5))
    assert sampler.pick(logits, [0, 0]) == 1
    assert sampler.pick(np.array([-1.0, -1.2], dtype=np.float32), [0]) == 1
    assert logits.tolist() == pytest.approx([2.0, 1.9, -1.0])


def test_seed_reproduces_and_none_does_not():
    logits = logits_of(1000, scale=0.1)

    def draw(seed):
        sampler = Sampler(Sampling(temperature=1.0, seed=seed))
        return [sampler.pick(logits) for _ in range(20)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)


def test_filters_never_leave_nothing():
    logits = np.zeros(5000, dtype=np.float32)  # all equal
    for s in (Sampling(temperature=1.0, top_p=1e-9), Sampling(temperature=1.0, min_p=1.0, top_k=1)):
        ids, _ = distribution(s, logits)
        assert len(ids) == 1


def test_top_k_keeps_exactly_k_of_equals():
    ids, _ = distribution(Sampling(temperature=1.0, top_k=3), np.zeros(10_000, dtype=np.float32))
    assert len(set(ids.tolist())) == 3


@pytest.mark.parametrize(("n", "k"), [(5, 5), (100, 1), (10_001, 40), (262_144, 40), (3000, 2999)])
def test_largest(n, k):
    values = logits_of(n)
    assert set(largest(values, k)) == set(np.argsort(-values, kind="stable")[:k])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("s", [Sampling(), Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=2, top_p=0.5)])
def test_logits_that_are_not_finite_are_an_error(s, bad):
    logits = logits_of(5000)
    logits[17] = bad
    with pytest.raises(FewfireError, match="finite"):
        Sampler(s).pick(logits)


def test_masked_logits_are_never_drawn():
    logits = np.full(100, -np.inf, dtype=np.float32)
    logits[42] = -5.0
    assert Sampler(Sampling(temperature=2.0, top_p=0.9)).pick(logits) == 42


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("seed", -1),
        ("seed", 1.0),
    ],
)
def test_out_of_range_options_are_named(field, value):
    with pytest.raises(ValueError, match=field) as caught:
        Sampling(**{field: value})
    assert "\n" not in str(caught.value)


def test_numpy_numbers_are_numbers():
    assert Sampling(temperature=np.float32(0.5), top_k=np.int64(4), seed=np.uint8(3)).top_k == 4


def test_a_large_vocabulary_costs_little():
    """A bound that only a full sort (25 ms here) would break, so that a busy machine does not fail it."""
    logits = logits_of(262_144)
    sampler = Sampler(Sampling(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05, seed=0))
    best = min(_timed(lambda: sampler.pick(logits)) for _ in range(10))
    assert best < 0.008


def _timed(f) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=1.3),
        Sampling(temperature=1.8, top_p=0.95),
        Sampling(temperature=0.3, top_k=5, min_p=0.2),
    ],
    ids=str,
)
def test_distribution_equals_that_of_transformers(sampling):
    torch = pytest.importorskip("torch", reason="needs the `peers` extra")
    process = pytest.importorskip("transformers.generation.logits_process")
    s, logits, history = sampling, logits_of(5000), RNG.integers(0, 5000, 200).tolist()
    steps = [
        process.RepetitionPenaltyLogitsProcessor(float(s.repetition_penalty)),
        process.TemperatureLogitsWarper(s.temperature),
    ]
    steps += [process.TopKLogitsWarper(s.top_k)] if s.top_k else []
    steps += [process.TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []
    steps += [process.MinPLogitsWarper(s.min_p)] if s.min_p else []
    scores = torch.from_numpy(logits.copy())[None]
    for step in steps:
        scores = step(torch.tensor([history]), scores)
    theirs = torch.softmax(scores[0].double(), dim=-1).numpy()
    ids, p = distribution(sampling, logits, history)
    assert set(ids.tolist()) == set(np.flatnonzero(theirs).tolist())
    np.testing.assert_allclose(p, theirs[ids], rtol=1e-4)
