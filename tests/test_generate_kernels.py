"""Writing text on the device against the reference: states, prompts, and the characters drawn."""

import numpy as np
import pytest

import kernels
from kernels import runtime
from kernels.generate import MAX_ROWS
from rnn import reference
from rnn.params import named_views
from tests import host_cuda
from tests.cases import Case, random_case
from tests.compare import assert_close

OPTIONS = {"temperature": 0.8, "top_k": 5, "top_p": 0.95, "min_p": 0.01}


def text_case(R: int, H: int, V: int, layers: int) -> Case:
    """A model, and R rows of states; E is any."""
    return random_case(T=1, B=R, E=3, H=H, V=V, layers=layers, seed=R, scale=0.7)


def prompts(T: int, R: int, V: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First characters (R,), forced ones (T, R) of prompts of different lengths, and uniform numbers (T, R)."""
    rng = np.random.default_rng([T, R])
    forced_tr = rng.integers(0, V, (T, R)).astype(np.int32)
    forced_tr[np.arange(T)[:, None] >= np.arange(R) % T] = -1
    return rng.integers(1, V, R).astype(np.int32), forced_tr, rng.random((T, R), np.float32)


def written(ops, to_device, dtype, case: Case, T: int, **options) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids_tr, the last ids and the states that an op set leaves; `to_device` makes its arrays of NumPy's."""
    V, H, R = case.sizes.V, case.sizes.H, case.h0.shape[1]
    first, forced_tr, uniforms_tr = prompts(T, R, V)
    params = named_views(case.flat_params.astype(dtype), case.sizes)
    P = np.empty((V, 3 * H), dtype)
    reference.input_table_forward(params["W_emb"], params["W_ih.0"], params["b_ih.0"], P)
    params = {name: to_device(array) for name, array in params.items()}
    h, ids, ids_tr = (to_device(array) for array in (case.h0.astype(dtype), first, np.full((T, R), -7, np.int32)))
    ops.generate(params, to_device(P), h, ids, to_device(forced_tr), to_device(uniforms_tr.astype(dtype)), ids_tr,
                 ops.generation_saved(R, H, V, dtype), **options)
    return ops.to_host(ids_tr), ops.to_host(ids), ops.to_host(h)


def written_on_device(case: Case, T: int, **options):
    return written(kernels, runtime.to_device, np.float32, case, T, **options)


def assert_text_matches_reference(case: Case, T: int, **options) -> None:
    exact, rounded = (written(reference, np.copy, dtype, case, T, **options) for dtype in (np.float64, np.float32))
    ids_tr, ids, h = written_on_device(case, T, **options)
    np.testing.assert_array_equal(ids_tr, exact[0])
    np.testing.assert_array_equal(ids, exact[1])
    assert_close("h", h, exact[2], rounded[2])


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("R", [1, 2, 3, MAX_ROWS, MAX_ROWS + 1])
def test_text_and_states_match_reference(executor, R, layers):
    assert_text_matches_reference(text_case(R, H=9, V=11, layers=layers), T=5, temperature=0.8)


@pytest.mark.parametrize("H, V", [(1, 2), (8, 7), (31, 66), (32, 8), (33, 9), (65, 257)])
def test_sizes_below_at_and_above_a_warp(executor, H, V):
    assert_text_matches_reference(text_case(3, H, V, layers=2), T=3, **OPTIONS)


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, OPTIONS], ids=str)
def test_options_reach_the_drawing(executor, options):
    assert_text_matches_reference(text_case(4, H=6, V=13, layers=1), T=20, **options)


def test_a_prompt_is_read_without_drawing(executor):
    """Every character forced: what is written is the prompt, and nobody reads the logits, which stay NaN."""
    case = text_case(2, H=5, V=7, layers=2)
    params = {name: runtime.to_device(array.astype(np.float32)) for name, array in
              named_views(case.flat_params, case.sizes).items()}
    forced_tr = np.array([[3, 0], [1, 6], [0, 2]], np.int32)
    ids, ids_tr = runtime.to_device(np.array([1, 2], np.int32)), runtime.empty((3, 2), np.int32)
    saved = kernels.generation_saved(2, 5, 7)._replace(logits_r=runtime.to_device(np.full((2, 7), np.nan, np.float32)))
    kernels.generate(params, runtime.zeros((7, 15), np.float32), runtime.to_device(case.h0.astype(np.float32)), ids,
             runtime.to_device(forced_tr), runtime.zeros((3, 2), np.float32), ids_tr, saved)
    np.testing.assert_array_equal(runtime.to_host(ids_tr), forced_tr)
    np.testing.assert_array_equal(runtime.to_host(ids), forced_tr[-1])
    assert np.isnan(runtime.to_host(saved.logits_r)).all()


def test_text_goes_on_where_it_stopped(executor):
    """Two calls of two steps write what one call of four steps writes."""
    case = text_case(3, H=7, V=9, layers=2)
    params = {name: runtime.to_device(array.astype(np.float32)) for name, array in
              named_views(case.flat_params, case.sizes).items()}
    P = runtime.to_device(np.random.default_rng(1).standard_normal((9, 21)).astype(np.float32))
    results = []
    for cuts in ([0, 4], [0, 2, 4]):
        first, forced_tr, uniforms_tr = prompts(4, 3, 9)
        h, ids = runtime.to_device(case.h0.astype(np.float32)), runtime.to_device(first)
        ids_tr, saved = runtime.empty((4, 3), np.int32), kernels.generation_saved(3, 7, 9)
        forced_tr, uniforms_tr = runtime.to_device(forced_tr), runtime.to_device(uniforms_tr)
        for a, b in zip(cuts, cuts[1:]):
            kernels.generate(params, P, h, ids, forced_tr[a:b], uniforms_tr[a:b], ids_tr[a:b], saved)
        results.append((runtime.to_host(ids_tr), runtime.to_host(h)))
    for whole, halves in zip(*results):
        np.testing.assert_array_equal(whole, halves)


def test_generation_does_not_depend_on_the_order_of_threads(ordered_executor):
    assert_text_matches_reference(text_case(3, H=11, V=13, layers=2), T=4, **OPTIONS)


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizer_finds_nothing_in_generation(sanitizer):
    def run():
        written_on_device(text_case(3, H=9, V=10, layers=2), 1)

    assert host_cuda.run_sanitized(run, sanitizer) == ""


@pytest.mark.parametrize("name, bad", [("P", np.zeros((7, 14), np.float32)), ("h", np.zeros((1, 2, 5))),
                                       ("ids", np.zeros(2)), ("uniforms_tr", np.zeros((4, 2), np.float32)),
                                       ("ids_tr", np.zeros((3, 2), np.int64))])
def test_generate_names_the_argument_that_does_not_fit(executor, name, bad):
    case = text_case(2, H=5, V=7, layers=1)
    params = {key: runtime.to_device(array.astype(np.float32)) for key, array in
              named_views(case.flat_params, case.sizes).items()}
    arguments = {"P": np.zeros((7, 15), np.float32), "h": np.zeros((1, 2, 5), np.float32), "ids": np.zeros(2, np.int32),
                 "forced_tr": np.zeros((3, 2), np.int32), "uniforms_tr": np.zeros((3, 2), np.float32),
                 "ids_tr": np.zeros((3, 2), np.int32)}
    arguments = {key: runtime.to_device(array) for key, array in (arguments | {name: bad}).items()}
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        kernels.generate(params, **arguments, saved=kernels.generation_saved(2, 5, 7))
