"""Texts for tests of generation: a model with prompts, the text that the kernels write with it, and its comparison
with the specification, which reads that text (`tests/helpers/drawn.py`)."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from char_gru import kernels
from char_gru.kernels import runtime
from char_gru.kernels.plan.generation import GenerationPlan
from char_gru.rnn import reference
from char_gru.rnn.checkpoint import load_checkpoint
from char_gru.rnn.params import named_views
from char_gru.rnn.training import SAMPLE_LENGTH, SAMPLE_TEMPERATURE
from tests.helpers.cases import Case, random_case
from tests.helpers.compare import assert_close
from tests.helpers.drawn import Drawn, assert_drawn

OPTIONS = {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.1}
"""All options of drawing; each of them changes texts."""


def slow(*values):
    """A case of a parametrized test that takes a second or more, most of it to compile a kernel for the case."""
    return pytest.param(*values, marks=pytest.mark.slow)


def skip_unless_it_fits(executor, plan: GenerationPlan) -> None:
    """Skip a test whose plan was made for another GPU, where the GPU at hand has less shared memory."""
    if executor.array_type is not np.ndarray and not plan.fits(executor.gpu):
        pytest.skip(f"{executor.gpu.name} has less shared memory than the harness")


def text_case(R: int, H: int, V: int, layers: int, scale: float = 0.7) -> Case:
    """A model, and R rows of states."""
    return random_case(T=1, B=R, E=3, H=H, V=V, layers=layers, seed=R, scale=scale)


def prompts(T: int, R: int, V: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First ids (R,) and forced ids (T, R) of prompts of different lengths, and uniform numbers (T, R)."""
    rng = np.random.default_rng([T, R])
    forced_tr = rng.integers(0, V, (T, R)).astype(np.int32)
    forced_tr[np.arange(T)[:, None] >= np.arange(R) % T] = -1
    return rng.integers(1, V, R).astype(np.int32), forced_tr, rng.random((T, R), np.float32)


def written_on_device(case: Case, T: int, variant: str | None = None,
                      **options) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids_tr, the last ids and the states that the kernels leave after T steps; options: those of
    `kernels.generate`."""
    V, H, R = case.sizes.V, case.sizes.H, case.h0.shape[1]
    params = named_views(case.flat_params.astype(np.float32), case.sizes)
    P = reference.input_table_forward(params["W_emb"], params["W_ih.0"], params["b_ih.0"])
    params = {name: runtime.to_device(array) for name, array in params.items()}
    first, forced_tr, uniforms_tr = map(runtime.to_device, prompts(T, R, V))
    h, ids_tr = runtime.to_device(case.h0.astype(np.float32)), runtime.to_device(np.full((T, R), -7, np.int32))
    kernels.generate(params, runtime.to_device(P), h, first, forced_tr, uniforms_tr, ids_tr,
                     kernels.generation_saved(R, H, V), variant=variant, **options)
    return runtime.to_host(ids_tr), runtime.to_host(first), runtime.to_host(h)


def assert_text_matches_reference(case: Case, T: int, *, variant=None, weights="fp32", **options) -> Drawn:
    """Assert that the kernels write a text that the specification may write, and leave its states up to rounding."""
    first, forced_tr, uniforms_tr = prompts(T, case.h0.shape[1], case.sizes.V)
    result = written_on_device(case, T, variant, weights=weights, **options)
    return assert_written(named_views(case.flat_params, case.sizes), case.h0, first, forced_tr, uniforms_tr, result,
                          weights=weights, **options)


def assert_written(params, h, first, forced_tr, uniforms_tr, result, *, P=None, weights="fp32", **options) -> Drawn:
    """Assert that a `generate` from states h and characters `first` wrote what it was forced to, drew all else as
    `assert_drawn` allows, given the text before it, and left the states of this text up to rounding.

    params, h: NumPy arrays in any float dtype. result: ids_tr, the last ids and the states that `generate` left. P: the
    input table, where it is not that of params.
    """
    ids_tr, ids, h_after = result
    T, V = len(forced_tr), len(params["W_out"])
    assert ids_tr.shape == forced_tr.shape and ((ids_tr >= 0) & (ids_tr < V)).all()
    np.testing.assert_array_equal(ids, ids_tr[-1] if T else first)
    free = forced_tr < 0
    np.testing.assert_array_equal(ids_tr[~free], forced_tr[~free])
    (exact, h_exact), (single, h_single) = (read_by_reference(params, h, first, ids_tr, dtype, P, weights)
                                            for dtype in (np.float64, np.float32))
    drawn = assert_drawn("drawn", ids_tr[free], uniforms_tr[free], exact[free], single[free], **options)
    assert_close("h", h_after, h_exact, h_single)
    return drawn


def read_by_reference(params, h, first, ids_tr, dtype, P=None, weights="fp32") -> tuple[np.ndarray, np.ndarray]:
    """The specification reads a text, in a dtype: the logits (T, R, V) of each character given all before it, and the
    states (layers, R, H) after the last step of `rnn.reference.generate`, which does not read the last character."""
    params, (T, R), H = {name: array.astype(dtype) for name, array in params.items()}, ids_tr.shape, h.shape[2]
    W = {name: reference.rounded(array, weights) for name, array in params.items() if name.startswith("W")}
    if P is None:
        P = reference.input_table_forward(params["W_emb"], params["W_ih.0"], params["b_ih.0"])
    i, ids_tb, states = P.astype(dtype), np.concatenate([first[None], ids_tr])[:-1], []
    for layer, h0 in enumerate(h.astype(dtype)):
        h_tb = reference.gru_forward(i, ids_tb, W[f"W_hh.{layer}"], params[f"b_hh.{layer}"], h0).h_tb
        states.append(h_tb[-1])
        if layer + 1 < len(h):
            above = f"ih.{layer + 1}"
            i = reference.input_table_forward(h_tb[1:].reshape(-1, H), W[f"W_{above}"], params[f"b_{above}"])
            ids_tb = np.arange(T * R).reshape(T, R)
    return h_tb[1:] @ W["W_out"].T + params["b_out"], np.array(states)


def assert_texts_drawn(params, vocabulary, prompts, texts, seed: int, **options) -> Drawn:
    """Assert that texts continue prompts as `Generator.generate` has it: each of their characters is drawn, as
    `assert_drawn` allows it, with its own number of the seed's stream.

    params: NumPy arrays in float32 or float64; texts: of one length, without the prompts."""
    [length] = {len(text) for text in texts}
    uniforms_tr = np.random.Generator(np.random.Philox(key=seed)).random((length, len(texts)), np.float32)
    zero_state = np.zeros((sum(name.startswith("W_hh") for name in params), 1, params["W_hh.0"].shape[1]))
    ids, logits = [], {np.float64: [], np.float32: []}
    for prompt, text in zip(prompts, texts, strict=True):
        read = vocabulary.encode((prompt or "\n") + text).astype(np.int32)[:, None]
        ids.append(read[-length:, 0])
        for dtype, of_rows in logits.items():
            of_rows.append(read_by_reference(params, zero_state, read[0], read[1:], dtype)[0][-length:, 0])
    return assert_drawn("texts", np.concatenate(ids), uniforms_tr.T.ravel(), *map(np.concatenate, logits.values()),
                        **options)


def assert_samples_drawn(run: Path) -> None:
    """Assert that the samples of a run with `--save-every 1` are drawn from the models that it saved: one after each
    epoch, and one at the end of the run where that lies inside an epoch."""
    seed, samples = json.loads((run / "config.json").read_text())["seed"], (run / "samples.txt").read_bytes().decode()
    last = load_checkpoint(run / "last.safetensors")
    models = [(f"epoch {number}", load_checkpoint(path), number)
              for number, path in enumerate(sorted(run.glob("epoch-*.safetensors")), 1)]
    if last.resumable.progress["batch"]:
        step = last.resumable.progress["step"]
        models.append((f"epoch {len(models) + 1}, step {step}", last, step))
    texts = re.findall(f"--- epoch [^\n]+\n(.{{{SAMPLE_LENGTH}}})\n", samples, re.DOTALL)
    assert models and samples == "".join(f"--- {place}\n{text}\n" for (place, *_), text in zip(models, texts))
    for (_, checkpoint, number), text in zip(models, texts, strict=True):
        assert_texts_drawn(checkpoint.params, checkpoint.vocabulary, [""], [text], seed + number,
                           temperature=SAMPLE_TEMPERATURE)
