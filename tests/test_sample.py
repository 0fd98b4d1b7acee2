"""Drawing characters on the device against their definition."""

import numpy as np
import pytest

from char_gru.kernels import naive, runtime
from char_gru.kernels.generate import sample
from char_gru.kernels.plan.recurrence import THREADS
from char_gru.rnn import reference
from tests import host_cuda
from tests.helpers.texts import slow

LARGEST_UNIFORM = 1 - 2**-24
OPTIONS = [
    {"temperature": 1.0}, {"temperature": 0.0}, {"temperature": 0.3}, {"temperature": 2.5},
    {"top_k": 1}, {"top_k": 5}, {"top_k": 10**12}, {"top_p": 0.9}, {"top_p": 0.5, "temperature": 0.5}, {"top_p": 1e-9},
    {"min_p": 0.2}, {"min_p": 1.0}, {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
]

pytestmark = pytest.mark.parametrize("sample", [sample, naive.sample], ids=["fast", "naive"])


def drawn(sample, logits: np.ndarray, uniforms, **options) -> np.ndarray:
    """What the device draws; logits (R, V), uniforms (R,)."""
    logits, uniforms = (runtime.to_device(np.asarray(array, np.float32)) for array in (logits, uniforms))
    ids = runtime.empty((len(logits),), np.int32)
    sample(logits, uniforms, ids, **options)
    return runtime.to_host(ids)


def row_of_logits(V: int, seed: int = 0) -> np.ndarray:
    """Logits of which [UNK] has the largest."""
    logits = 2 * np.random.default_rng([V, seed]).standard_normal(V).astype(np.float32)
    logits[0] = 100
    return logits


def kept_characters(logits: np.ndarray, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> dict:
    """The characters that stay, by the definition in float64: id -> its share, and the number in the share's middle."""
    ranked = sorted(range(1, len(logits)), key=lambda v: (-logits[v], v))
    if temperature == 0:
        return {ranked[0]: (1.0, 0.5)}
    p = {v: np.exp((float(logits[v]) - float(logits[ranked[0]])) / temperature) for v in ranked}
    if top_k:
        ranked = ranked[:top_k]
    through = np.cumsum([p[v] for v in ranked])
    if top_p < 1:
        ranked = ranked[:1 + int((through < top_p * through[-1]).sum())]
    kept = sorted(v for v in ranked if p[v] >= min_p)
    ends = np.cumsum([p[v] for v in kept])
    return {v: (p[v] / ends[-1], (end - p[v] / 2) / ends[-1]) for v, end in zip(kept, ends)}


def assert_middles_are_drawn(sample, logits: np.ndarray, rows: int, **options) -> None:
    """A kept character is drawn by the middle of its share, where that is far above rounding; up to `rows` of them."""
    kept = [(v, middle) for v, (share, middle) in kept_characters(logits, **options).items() if share > 1e-4]
    kept = [kept[i] for i in np.linspace(0, len(kept) - 1, min(rows, len(kept))).astype(int)]
    ids, middles = zip(*kept)
    assert drawn(sample, np.tile(logits, (len(ids), 1)), middles, **options).tolist() == list(ids)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("V", [2, 3, 66, THREADS, THREADS + 1, THREADS + 2])
def test_kept_characters_are_drawn_by_the_middle_of_their_shares(executor, sample, V, options):
    assert_middles_are_drawn(sample, row_of_logits(V), rows=12, **options)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 200, "top_p": 0.7},
                                     slow({"top_p": 0.97, "min_p": 1e-3})], ids=str)
def test_large_vocabulary(executor, sample, options):
    assert_middles_are_drawn(sample, row_of_logits(20_001), rows=3, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_smallest_and_the_largest_number_draw_the_first_and_the_last_kept(executor, sample, options):
    rows = np.stack([row_of_logits(66, seed) for seed in range(20)])
    first = [min(kept_characters(row, **options)) for row in rows]
    assert drawn(sample, rows, np.zeros(20), **options).tolist() == first
    for row, last in zip(rows, drawn(sample, rows, np.full(20, LARGEST_UNIFORM), **options)):
        share, middle = kept_characters(row, **options)[last]
        assert middle + share / 2 > 1 - 1e-6, "it is not the last, nor are all behind it as small as rounding"


@pytest.mark.parametrize("impossible", [0, slow(THREADS)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_ties_and_certainties_are_drawn_as_the_reference_does(executor, sample, options, impossible):
    """So few characters that each thread has one, and more of them, that add nothing to any sum. Rounding decides none:
    each number above 0 is at least 1e-3 from a border, and the sums that meet a filter's edge are of ones."""
    rng = np.random.default_rng(3)
    logits = rng.choice(np.array([-80.0, -0.0, 0.0, 0.5, 80.0]), (60, 7))
    logits = np.pad(logits, ((0, 0), (0, impossible)), constant_values=-1e4)
    uniforms = rng.random(60, np.float32)
    uniforms[:20] = 0
    expected = reference.sample(logits.astype(np.float32), uniforms, **options)
    np.testing.assert_array_equal(drawn(sample, logits, uniforms, **options), expected)


def test_borders_are_exact_where_the_numbers_are(executor, sample):
    """Four equal characters: a border of shares belongs to the character behind it, and half of them reach 0.5."""
    logits = np.zeros((4, 5))
    assert drawn(sample, logits, [0, 0.25, 0.5, 0.75]).tolist() == [1, 2, 3, 4]
    assert drawn(sample, logits, [0, 0.25, 0.5, LARGEST_UNIFORM], top_p=0.5).tolist() == [1, 1, 2, 2]


def test_sums_that_round_end_at_the_last_kept_character(executor, sample):
    """Many equal shares: whatever the order of the sum, a number below 1 draws a character that is there."""
    ids = drawn(sample, np.where(np.arange(1500) < 1000, 0, -200)[None], [LARGEST_UNIFORM])
    assert ids == [999]


def test_sample_frequencies_are_the_softmax(executor, sample):
    logits = np.log(np.array([0.3, 0.1, 0.2, 0.4])) * 0.5
    ids = drawn(sample, np.tile(logits, (500, 1)), (np.arange(500) + 0.5) / 500, temperature=0.5)
    counts = np.bincount(ids, minlength=4)
    np.testing.assert_allclose(counts / 500, np.array([0, 0.1, 0.2, 0.4]) / 0.7, atol=4e-3)


@pytest.mark.parametrize("temperature", [1e-30, 1e-60])
def test_a_tiny_temperature_is_the_limit_zero(executor, sample, temperature):
    logits = np.stack([row_of_logits(66, seed) for seed in range(5)])
    np.testing.assert_array_equal(drawn(sample, logits, np.full(5, 0.7), temperature=temperature),
                                  drawn(sample, logits, np.full(5, 0.7), temperature=0))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("V", [9, THREADS + 9])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_logits_that_are_not_finite_draw_some_character(executor, sample, bad, options, V):
    logits = np.stack([row_of_logits(V), np.full(V, bad)])
    logits[0, 4] = bad
    ids = drawn(sample, logits, [0.3, 0.6], **options)
    assert ((ids > 0) & (ids < V)).all()


@pytest.mark.parametrize("V", [66, 300])
def test_sample_does_not_depend_on_the_order_of_threads(ordered_executor, sample, V):
    assert_middles_are_drawn(sample, row_of_logits(V), rows=12, **OPTIONS[-1])


@pytest.mark.parametrize("V", [66, 300])
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
@pytest.mark.slow
def test_sanitizer_finds_nothing_in_sample(sample, sanitizer, V):
    assert host_cuda.run_sanitized(lambda: drawn(sample, row_of_logits(V)[None], [0.6], **OPTIONS[-1]), sanitizer) == ""


def test_sample_names_the_argument_that_does_not_fit(executor, sample):
    logits, uniforms, ids = (runtime.zeros(shape, dtype) for shape, dtype in
                             (((3, 5), np.float32), ((3,), np.float32), ((3,), np.int32)))
    with pytest.raises(ValueError, match="^logits: expected .*V of at least 2"):
        sample(logits[:, :1], uniforms, ids)
    with pytest.raises(ValueError, match="^uniforms: expected .*float32"):
        sample(logits, uniforms[:2], ids)
    with pytest.raises(ValueError, match="^ids: expected .*int32"):
        sample(logits, uniforms, uniforms)
