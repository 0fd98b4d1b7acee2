"""Whether the kernels compute on this GPU what the specification says: `python -m kernels --check`.

A check runs kernels on random numbers and compares their results with `rnn.reference`, within an error that follows
from how much rounding the computation does (`allowed_error`). Drawn characters, and runs that have to give the same
bits, may not differ at all.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from char_gru import kernels
from char_gru.kernels import runtime
from char_gru.kernels.plan.generation import WEIGHTS, generation_plan
from char_gru.kernels.plan.gpus import precisions
from char_gru.kernels.plan.recurrence import backward_plan, forward_plan
from char_gru.rnn import reference, reference_ops
from char_gru.rnn.config import Sizes
from char_gru.rnn.model import LanguageModel
from char_gru.rnn.params import flat_size, named_views

FACTOR = 4
"""An implementation may err this many times as much as the specification in float32 does."""

FLOOR = 4
"""On top of that, this many epsilons of its dtype, relative to the tensor's largest entry."""

BORDER = 1e-4
"""Uniform numbers are at least this far from the border between two characters, so that rounding decides nothing."""

ROUNDING = {"fp32": 0.0, "tf32": 2.0**-11, "bf16": 2.0**-8}
"""Precision -> how much rounding changes an operand of a product, at most, relative to it."""

STEPS = 3  # of training


class Window(NamedTuple):
    """Sizes of a check: a window of T steps and B rows for a model, and the rows of text that are written."""

    T: int
    B: int
    E: int
    H: int
    V: int
    rows: tuple[int, ...]


WINDOWS = (
    Window(T=5, B=37, E=33, H=131, V=67, rows=(1, 5, 37)),  # odd: no tile is full, no row aligned
    Window(T=4, B=32, E=64, H=256, V=66, rows=(1,)),  # README's small model
    Window(T=3, B=64, E=256, H=1024, V=66, rows=(1, 64)),  # the tutorial's
)


class Result(NamedTuple):
    """The outcome of a check. `error` is the largest error of the array named by `where`, and `allowed` what it may be,
    for the array that takes the largest share of it; of results that have to be equal, `error` counts differences. A
    check that could not run has an infinite error, and says why in `where`."""

    name: str
    error: float
    allowed: float
    where: str

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed

    @property
    def used(self) -> float:
        """The share of the allowed error."""
        return self.error / max(self.allowed, np.finfo(np.float64).tiny)


def allowed_error(exact: np.ndarray, single: np.ndarray | None = None, dtype=np.float32) -> float:
    """The largest error that an implementation may make: `exact` is the specification's result in float64, `single` its
    result in float32, whose error is the measure of how much rounding the computation does."""
    allowed = FLOOR * np.finfo(dtype).eps * np.abs(exact).max()
    if single is not None:
        allowed += FACTOR * np.abs(np.asarray(single, np.float64) - exact).max()
    return float(allowed)


def run(as_json: bool, windows: tuple[Window, ...] = WINDOWS) -> int:
    """Check this machine's GPU, and print a line for each check and a verdict, or one object of JSON.

    Returns: exit status 0, or 1 where a check has not passed.
    Raises: DeviceError where CuPy or a GPU is missing.
    """
    executor, failed, results = runtime.current_executor(), 0, []
    facts = {"gpu": executor.gpu.name, "compute_capability": executor.gpu.capability / 10,
             "multiprocessors": executor.gpu.multiprocessors, **executor.versions(), "numpy": np.__version__}
    if not as_json:
        print("\n".join(f"{name:18} {value}" for name, value in facts.items()), flush=True)
    for result in results_of(checks_of(windows)):
        failed += not result.passed
        results.append(result)
        if not as_json:
            print(f"{'ok' if result.passed else 'WRONG':5} {result.name:58} error {result.error:8.2g}, "
                  f"allowed {result.allowed:8.2g}  {result.where}", flush=True)
    if as_json:
        finite = [{key: None if value == np.inf else value for key, value in result._asdict().items()}
                  | {"passed": result.passed} for result in results]
        print(json.dumps(facts | {"checks": finite, "passed": not failed}, indent=1))
    elif failed:
        print(f"{failed} of {len(results)} checks failed: do not trust this GPU's results; "
              "--device cpu computes without it")
    else:
        most = max(results, key=lambda result: result.used)
        print(f"All {len(results)} checks passed, with at most {most.used:.0%} of the allowed error ({most.name}, "
              f"{most.where}): the kernels compute on this GPU what the specification says.")
    return int(failed > 0)


def results_of(checks: Iterable[tuple[str, Callable[[str], Result]]]) -> Iterator[Result]:
    """The results of checks, one after the other. A check that cannot run is a result, too."""
    for name, check in checks:
        try:
            yield check(name)
        except Exception as error:  # noqa: BLE001 - whatever ends a check is what the user has to know
            first_line = next(iter(str(error).splitlines()), "")
            yield Result(name, np.inf, 0.0, f"{type(error).__name__}: {first_line}")


def checks_of(windows: tuple[Window, ...]) -> Iterator[tuple[str, Callable[[str], Result]]]:
    """Name and function of every check: the variants that plans choose for these windows on this GPU, and stepwise."""
    gpu = runtime.current_executor().gpu
    yield "sample", _check_sampling
    for window in windows:
        T, B, _, H, V, rows_of_texts = window
        at = f"T={T} B={B} H={H}"
        yield f"dropout {at}", functools.partial(_check_op, _dropout, window, kernels.op_set("fp32"), "fp32")
        yield f"global_norm, adam {at}", functools.partial(_check_op, _update, window, kernels.op_set("fp32"), "fp32")
        for precision in precisions(gpu):
            ops = kernels.op_set(precision)
            for op in (_input_table, _output_layer):
                yield f"{op.__name__[1:]} {precision} {at}", functools.partial(_check_op, op, window, ops, precision)
            for variant, plans in _recurrences(window, precision):
                planned = _with(ops, gru_forward={"plan": plans[0]}, gru_backward={"plan": plans[1]})
                yield f"gru {variant} {precision} {at}", functools.partial(_check_op, _gru, window, planned, precision)
            for layers in (1, 2):
                yield (f"training {precision} {at}{f' layers={layers}' * (layers > 1)}",
                       functools.partial(_check_training, window, layers, ops, precision))
        for layers, R, weights in itertools.product((1, 2), rows_of_texts, WEIGHTS):
            for variant in dict.fromkeys((generation_plan(gpu, R, V, H, layers, weights).variant, "stepwise")):
                yield (f"generate {variant} {weights} H={H} rows={R}{f' layers={layers}' * (layers > 1)}",
                       functools.partial(_check_text, window, layers, R, weights, variant))


def _recurrences(window: Window, precision: str) -> Iterator[tuple[str, tuple]]:
    """Name and plans, forward and backward, of the variants of a recurrence: stepwise, and the one that is chosen."""
    gpu, V = runtime.current_executor().gpu, window.V
    chosen, stepwise = ((forward_plan(gpu, window.B, window.H, precision, variant=variant),
                         backward_plan(gpu, window.B, window.H, precision, V_out=V, V_in=V, variant=variant))
                        for variant in ("auto", "stepwise"))
    yield "stepwise", stepwise
    if chosen != stepwise:
        yield "/".join(dict.fromkeys(plan.variant for plan in chosen)), chosen


def _with(ops, **options: Mapping[str, Any]):
    """The op set, some of its ops with further keyword arguments."""
    changed = {name: functools.partial(getattr(ops, name), **given) for name, given in options.items()}
    return type(ops)(**vars(ops) | changed)


# ---- Comparisons ----------------------------------------------------------------------------------------------------

def _compared(name: str, actual: dict, exact: dict, single: dict, precision: str = "fp32") -> Result:
    """The result for the array that takes the largest share of the error it is allowed: twice `allowed_error`, as
    another machine's NumPy may err less in `single`, and one rounding of an operand, as a number alone, such as a loss,
    may be nearly right there by chance."""
    results = []
    for array, value in exact.items():
        value = np.asarray(value, np.float64)
        error = np.abs(np.asarray(actual[array], np.float64) - value).max()
        allowed = 2 * allowed_error(value, single[array]) + ROUNDING[precision] * np.abs(value).max()
        results.append(Result(name, float(error) if np.isfinite(error) else np.inf, float(allowed), array))
    return max(results, key=lambda result: result.used)


def _equal(name: str, where: str, actual: dict, expected: dict) -> Result:
    """The result of a comparison of bits."""
    differing = sum(int(np.sum(np.asarray(actual[array]) != np.asarray(expected[array]))) for array in expected)
    return Result(name, float(differing), 0.0, where)


class _Arrays:
    """Arrays of an op set: the same random numbers for each op set, in a dtype."""

    def __init__(self, ops, dtype):
        self._ops, self._dtype, self._rng = ops, dtype, np.random.default_rng(0)

    def empty(self, *shape: int):
        return self._ops.empty(shape, self._dtype)

    def copied(self, array: np.ndarray, dtype=None):
        copy = self._ops.empty(array.shape, dtype or self._dtype)
        self._ops.copy_in(copy, array)
        return copy

    def normal(self, *shape: int, scale: float = 1.0):
        return self.copied(np.float32(scale) * self._rng.standard_normal(shape, np.float32))

    def ids(self, below: int, *shape: int):
        return self.copied(self._rng.integers(0, below, shape), np.int32)


def _results(op: Callable, window: Window, ops, dtype) -> dict[str, np.ndarray]:
    return {name: ops.to_host(array) for name, array in op(ops, _Arrays(ops, dtype), window).items()}


@functools.cache
def _specified(op: Callable, window: Window, precision: str, dtype: type) -> dict[str, np.ndarray]:
    return _results(op, window, reference_ops.op_set(precision), dtype)


def _check_op(op: Callable, window: Window, ops, precision: str, name: str) -> Result:
    return _compared(name, _results(op, window, ops, np.float32), _specified(op, window, "fp32", np.float64),
                     _specified(op, window, precision, np.float32), precision)


# ---- Ops: each function runs ops of an op set, and gives their results by name --------------------------------------

def _input_table(ops, arrays: _Arrays, window: Window) -> dict:
    _, _, E, H, V, _ = window
    x, W_ih, b_ih = arrays.normal(V, E), arrays.normal(3 * H, E, scale=E**-0.5), arrays.normal(3 * H)
    results = {"P": arrays.empty(V, 3 * H), "dx": arrays.empty(V, E), "dW_ih": arrays.empty(3 * H, E),
               "db_ih": arrays.empty(3 * H)}
    P, *gradients = results.values()
    ops.input_table_forward(x, W_ih, b_ih, P)
    ops.input_table_backward(arrays.normal(V, 3 * H), x, W_ih, *gradients)
    return results


def _gru(ops, arrays: _Arrays, window: Window) -> dict:
    T, B, _, H, V, _ = window
    P, ids_tb, W_hh = arrays.normal(V, 3 * H), arrays.ids(V, T, B), arrays.normal(3 * H, H, scale=H**-0.5)
    b_hh, h0, saved = arrays.normal(3 * H), arrays.normal(B, H), ops.gru_saved(T, B, H, arrays._dtype)
    gradients = {"dP": arrays.empty(V, 3 * H), "dW_hh": arrays.empty(3 * H, H), "db_hh": arrays.empty(3 * H),
                 "dh0": arrays.empty(B, H)}
    ops.gru_forward(P, ids_tb, W_hh, b_hh, h0, saved)
    ops.gru_backward(arrays.normal(T, B, V), arrays.normal(V, H), ids_tb, W_hh, saved, *gradients.values())
    return {"h_tb": saved.h_tb, "gates_tb": saved.gates_tb, "a_n_tb": saved.a_n_tb} | gradients


def _output_layer(ops, arrays: _Arrays, window: Window) -> dict:
    T, B, _, H, V, _ = window
    h_tb, W_out, b_out = arrays.normal(T, B, H), arrays.normal(V, H, scale=H**-0.5), arrays.normal(V)
    results = {"loss": arrays.empty(1), "dlogits_tb": arrays.empty(T, B, V), "dW_out": arrays.empty(V, H),
               "db_out": arrays.empty(V), "dh_tb": arrays.empty(T, B, H)}
    ops.cross_entropy_forward(h_tb, W_out, b_out, arrays.ids(V, T, B), results["loss"], results["dlogits_tb"])
    dlogits_tb, dW_out, db_out, dh_tb = (results[name] for name in ("dlogits_tb", "dW_out", "db_out", "dh_tb"))
    ops.cross_entropy_backward(dlogits_tb, h_tb, dW_out, db_out, W_out, dh_tb)
    return results


def _dropout(ops, arrays: _Arrays, window: Window) -> dict:
    T, B, _, H, *_ = window
    keep_tb, y_tb, dx_tb = ops.empty((T, B, H), bool), arrays.empty(T, B, H), arrays.empty(T, B, H)
    ops.dropout_forward(arrays.normal(T, B, H), 0.3, 5, 1, arrays.copied(np.array([7]), np.uint64), keep_tb, y_tb)
    ops.dropout_backward(y_tb, 0.3, keep_tb, dx_tb)
    return {"keep_tb": keep_tb, "y_tb": y_tb, "dx_tb": dx_tb}


def _update(ops, arrays: _Arrays, window: Window) -> dict:
    N = 3 * window.H * window.E + 1
    results = {"params": arrays.normal(N), "m": arrays.normal(N), "v": arrays.copied(np.linspace(0, 1, N))}
    grads, norm = arrays.normal(N), arrays.empty(1)
    ops.global_norm(grads, norm)
    ops.adam(results["params"], grads, results["m"], results["v"], norm, arrays.copied(np.array([1e-3])), 0.5)
    return results | {"norm": norm}


# ---- Training -------------------------------------------------------------------------------------------------------

def _trained(window: Window, layers: int, ops, dtype, graph: bool = True) -> dict:
    """Losses, norms and moments of a few training steps, and the gradients of a window after them."""
    T, B, E, H, V, _ = window
    rng, sizes = np.random.default_rng(1), Sizes(V, E, H, layers)
    flat_params = 2 * H**-0.5 * rng.standard_normal(flat_size(sizes), np.float32)
    model = LanguageModel(sizes, T, B, flat_params, ops=ops, dtype=dtype, dropout=0.3 * (layers > 1), clip_norm=0.5,
                          carry_state=True, graph=graph)
    values = {}
    for step in range(STEPS):
        inputs_tb, targets_tb = rng.integers(0, V, (2, T, B))
        result = model.train_step(inputs_tb, targets_tb)
        values |= {f"{name} of step {step + 1}": float(value) for name, value in result.items()}
    values |= {f"m of {name}": ops.to_host(array) for name, array in model.m.items()}
    return values | {f"gradient of {name}": value for name, value in model.gradients(inputs_tb, targets_tb).items()}


@functools.cache
def _specified_training(window: Window, layers: int, precision: str, dtype: type) -> dict:
    return _trained(window, layers, reference_ops.op_set(precision), dtype)


def _check_training(window: Window, layers: int, ops, precision: str, name: str) -> Result:
    """As the specification; the same bits without a graph, and the same bits again."""
    trained = _trained(window, layers, ops, np.float32)
    for where, graph in (("values that differ without a graph", False), ("values that differ in a second run", True)):
        equal = _equal(name, where, _trained(window, layers, ops, np.float32, graph), trained)
        if not equal.passed:
            return equal
    return _compared(name, trained, _specified_training(window, layers, "fp32", np.float64),
                     _specified_training(window, layers, precision, np.float32), precision)


# ---- Text -----------------------------------------------------------------------------------------------------------

class _Text(NamedTuple):
    """A model, and the text that the specification writes with it in float64.

    Shapes: params name -> array; P (V, 3H); h0, h (layers, R, H), before and after it; ids (R,), before it; forced_tr,
    ids_tr (T, R) int32; uniforms_tr (T, R) float32, none of them near the border between two characters.
    """

    params: dict
    P: np.ndarray
    h0: np.ndarray
    ids: np.ndarray
    forced_tr: np.ndarray
    uniforms_tr: np.ndarray
    ids_tr: np.ndarray
    h: np.ndarray


@functools.cache
def _specified_text(window: Window, layers: int, R: int, weights: str, steps: int = 6) -> _Text:
    _, _, E, H, V, _ = window
    rng, sizes = np.random.default_rng(R), Sizes(V, E, H, layers)
    flat_params = 2 * H**-0.5 * rng.standard_normal(flat_size(sizes), np.float32)
    params = named_views(flat_params, sizes)
    P = reference.input_table_forward(params["W_emb"], params["W_ih.0"], params["b_ih.0"])
    h0, first = rng.standard_normal((layers, R, H), np.float32), rng.integers(1, V, R).astype(np.int32)
    forced_tr = np.full((steps, R), -1, np.int32)
    forced_tr[0, ::2] = rng.integers(1, V, len(forced_tr[0, ::2]))
    double = {name: array.astype(np.float64) for name, array in params.items()}
    h, ids, uniforms_tr, ids_tr = h0.astype(np.float64), first, np.empty((steps, R), np.float32), []
    for t in range(steps):
        def step(uniforms, t=t, h=h, ids=ids):
            return reference.generate(double, P.astype(np.float64), h, ids, forced_tr[t:t + 1], uniforms[None],
                                      weights=weights)

        uniforms_tr[t] = _away_from_borders(lambda uniforms: step(uniforms)[1], rng, R)
        h, ids, _ = step(uniforms_tr[t])
        ids_tr.append(ids)
    return _Text(params, P, h0, first, forced_tr, uniforms_tr, np.array(ids_tr), h)


def _away_from_borders(drawn: Callable, rng: np.random.Generator, R: int) -> np.ndarray:
    """Uniform numbers (R,) that draw the same characters when they are a little smaller or larger."""
    uniforms = BORDER + (1 - 2 * BORDER) * rng.random(R)
    while True:
        near = drawn(uniforms - BORDER) != drawn(uniforms + BORDER)
        if not near.any():
            return uniforms.astype(np.float32)
        uniforms[near] = BORDER + (1 - 2 * BORDER) * rng.random(near.sum())


def _check_text(window: Window, layers: int, R: int, weights: str, variant: str, name: str) -> Result:
    """The characters of the specification, and its states up to rounding."""
    text, ops = _specified_text(window, layers, R, weights), kernels.op_set("fp32")
    arrays = _Arrays(ops, np.float32)
    h, ids, ids_tr = arrays.copied(text.h0), arrays.copied(text.ids, np.int32), arrays.copied(0 * text.ids_tr, np.int32)
    ops.generate({key: arrays.copied(array) for key, array in text.params.items()}, arrays.copied(text.P), h, ids,
                 arrays.copied(text.forced_tr, np.int32), arrays.copied(text.uniforms_tr), ids_tr,
                 ops.generation_saved(R, window.H, window.V), weights=weights, variant=variant)
    equal = _equal(name, "characters that differ", {"ids_tr": ops.to_host(ids_tr)}, {"ids_tr": text.ids_tr})
    if not equal.passed:
        return equal
    single = reference.generate(text.params, text.P, text.h0, text.ids, text.forced_tr, text.uniforms_tr,
                                weights=weights)
    return _compared(name, {"h": ops.to_host(h)}, {"h": text.h}, {"h": single[0]})


def _check_sampling(name: str) -> Result:
    """Every filter, with few and with many characters. The numbers are no nearer than BORDER to those that would draw
    otherwise."""
    ops, rng, R, differing = kernels.op_set("fp32"), np.random.default_rng(2), 50, 0
    arrays = _Arrays(ops, np.float32)
    filters = ({}, {"temperature": 0}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.8}, {"min_p": 0.05},
               {"temperature": 1.3, "top_k": 40, "top_p": 0.95, "min_p": 0.01})
    for V, options in itertools.product((67, 300), filters):
        logits = 2 * rng.standard_normal((R, V), np.float32)
        variants = [options | {"top_p": options["top_p"] + change} if "top_p" in options else options
                    for change in (0, -BORDER, BORDER)]
        clear = np.ones(R, bool)  # rows from which the same is drawn with a top_p a little smaller or larger
        uniforms = _away_from_borders(
            lambda numbers, logits=logits, options=options: reference.sample(logits, numbers, **options), rng, R)
        expected, *others = (reference.sample(logits.astype(np.float64), uniforms, **changed) for changed in variants)
        for other in others:
            clear &= other == expected
        ids = arrays.copied(np.zeros(R), np.int32)
        ops.sample(arrays.copied(logits), arrays.copied(uniforms), ids, **options)
        differing += int(np.sum((ops.to_host(ids) != expected)[clear]))
    return Result(name, float(differing), 0.0, "characters that differ")
