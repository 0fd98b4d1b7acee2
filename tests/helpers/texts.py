"""Texts for tests of generation: a model with prompts, the text that an op set writes with it, and the comparison of
the kernels' text with the specification's."""

import numpy as np
import pytest

from char_gru import kernels
from char_gru.kernels import runtime
from char_gru.rnn import reference_ops
from char_gru.rnn.params import named_views
from char_gru.rnn.reference import rounded
from tests.helpers.cases import Case, random_case
from tests.helpers.compare import assert_close

OPTIONS = {"temperature": 0.8, "top_k": 5, "top_p": 0.95, "min_p": 0.01}
"""All options of drawing; each of them changes texts."""


def slow(*values):
    """A case of a parametrized test that takes a second or more, most of it to compile a kernel for the case."""
    return pytest.param(*values, marks=pytest.mark.slow)


def text_case(R: int, H: int, V: int, layers: int, scale: float = 0.7) -> Case:
    """A model, and R rows of states."""
    return random_case(T=1, B=R, E=3, H=H, V=V, layers=layers, seed=R, scale=scale)


def prompts(T: int, R: int, V: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First ids (R,) and forced ids (T, R) of prompts of different lengths, and uniform numbers (T, R)."""
    rng = np.random.default_rng([T, R])
    forced_tr = rng.integers(0, V, (T, R)).astype(np.int32)
    forced_tr[np.arange(T)[:, None] >= np.arange(R) % T] = -1
    return rng.integers(1, V, R).astype(np.int32), forced_tr, rng.random((T, R), np.float32)


def written(ops, to_device, dtype, case: Case, T: int, rounded_to=None,
            **options) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids_tr, the last ids and the states that an op set leaves after T steps. `to_device` copies a NumPy array to the
    op set. With `rounded_to`, a precision, the weights are rounded to it first."""
    V, H, R = case.sizes.V, case.sizes.H, case.h0.shape[1]
    first, forced_tr, uniforms_tr = prompts(T, R, V)
    params = named_views(case.flat_params.astype(dtype), case.sizes)
    P = np.empty((V, 3 * H), dtype)
    reference_ops.input_table_forward(params["W_emb"], params["W_ih.0"], params["b_ih.0"], P)
    if rounded_to:
        params |= {name: rounded(array, rounded_to).astype(dtype) for name, array in params.items() if name[0] == "W"}
    params = {name: to_device(array) for name, array in params.items()}
    h, ids, ids_tr = (to_device(array) for array in (case.h0.astype(dtype), first, np.full((T, R), -7, np.int32)))
    ops.generate(params, to_device(P), h, ids, to_device(forced_tr), to_device(uniforms_tr.astype(dtype)), ids_tr,
                 ops.generation_saved(R, H, V, dtype), **options)
    return ops.to_host(ids_tr), ops.to_host(ids), ops.to_host(h)


def written_on_device(case: Case, T: int, variant: str | None = None, **options):
    """As `written`, by the kernels; options: those of `kernels.generate`."""
    return written(kernels, runtime.to_device, np.float32, case, T, variant=variant, **options)


def assert_text_matches_reference(case: Case, T: int, *, variant=None, weights="fp32", **options) -> None:
    """Assert that the kernels write the text of the specification, and leave its states up to rounding."""
    exact, single = (written(reference_ops, np.copy, dtype, case, T, weights if weights != "fp32" else None, **options)
                     for dtype in (np.float64, np.float32))
    ids_tr, ids, h = written_on_device(case, T, variant=variant, weights=weights, **options)
    np.testing.assert_array_equal(ids_tr, exact[0])
    np.testing.assert_array_equal(ids, exact[1])
    assert_close("h", h, exact[2], single[2])
