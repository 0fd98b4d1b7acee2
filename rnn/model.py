"""Forward and backward pass of the language model, written once on top of an op set.

An op set is `char_gru.rnn.cpu`, or what `char_gru.kernels.op_set` makes for a GPU: the same functions with the same
parameters, which compute what `char_gru.rnn.reference` specifies. The model does not ask which op set it is given.
Parameters, buffers and states are arrays of the op set, all made together with the model; a training step is a fixed
sequence of ops on them, with no decision on the host.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from char_gru.rnn import cpu
from char_gru.rnn.batches import Batch
from char_gru.rnn.checkpoint import Checkpoint, Resumable, find_checkpoint, load_checkpoint, save_checkpoint
from char_gru.rnn.config import Sizes, UserError
from char_gru.rnn.params import flat_size, initial_parameters, named_views
from char_gru.rnn.vocabulary import Vocabulary, checked_ids

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-7


class _Layer(NamedTuple):
    """Buffers of one GRU layer: P (V, 3H), above layer 0 (T*B, 3H), its input table; saved, the arrays of its forward
    and backward pass; keep_tb and dropped_tb (T, B, H), mask and output of the dropout behind it, or None where the
    model has no dropout.
    """

    P: object
    saved: object
    keep_tb: object
    dropped_tb: object


def _check_number(name: str, value: object, wanted: str, below: float = math.inf) -> None:
    """Raises: ValueError that names the argument, if it is no number in [0, below)."""
    number = np.asarray(value)
    if number.shape != () or number.dtype.kind not in "fiu" or not 0 <= number < below:
        raise ValueError(f"{name}: expected a finite number {wanted}, got {value!r:.50}")


class LanguageModel:
    """Embedding, GRU layers and softmax over characters, with Adam, for windows of up to (T, B).

    A training loop of your own needs only `train_step`; `params` (a dictionary of arrays by name), `step` and
    `state` may be read and written between steps, the arrays in place with `ops.copy_in`.

    Arguments: sizes; T, B, the window; flat_params (flat_size,) float, initial values in the layout of `rnn.params`
    (default: drawn from `seed`); dropout, the share of every layer's outputs dropped in training; clip_norm,
    the largest global norm of a gradient (0: any); carry_state, whether a step starts from the state in which the step
    before ended; seed, of initial values and dropout; dtype, of all floating arrays (the kernels take float32 only);
    ops, the op set; graph, whether a GPU records a step's launches once and replays them as one CUDA graph, with the
    same results.
    Raises: ValueError for other arguments.
    """

    def __init__(self, sizes: Sizes, T: int, B: int, flat_params: np.ndarray | None = None, *, dropout: float = 0.0,
                 clip_norm: float = 0.0, carry_state: bool = False, seed: int = 0, dtype=np.float32,
                 ops=cpu, graph: bool = True) -> None:
        if not all(isinstance(size, numbers.Integral) and size >= 1 for size in (T, B)):
            raise ValueError(f"T, B: expected whole numbers of at least 1, got {T}, {B}")
        _check_number("dropout", dropout, "in [0, 1)", 1)
        _check_number("clip_norm", clip_norm, "of at least 0")
        if flat_params is None:
            flat_params = initial_parameters(sizes, "pytorch", seed)
        if np.shape(flat_params) != (flat_size(sizes),):
            raise ValueError(f"flat_params: expected shape {(flat_size(sizes),)}, got {np.shape(flat_params)}")
        self.sizes, self.T, self.B, self.ops = sizes, T, B, ops
        self.dropout, self.clip_norm, self.carry_state, self.seed = dropout, clip_norm, carry_state, seed
        self.step = 0
        V, H, layers = sizes.V, sizes.H, sizes.layers

        def filled(shape: tuple[int, ...], value: object, as_dtype=dtype):
            array = ops.empty(shape, as_dtype)
            ops.copy_in(array, np.broadcast_to(value, shape))
            return array

        self._flat, self._grads, self._m, self._v = (
            filled((flat_size(sizes),), value) for value in (flat_params, 0, 0, 0))
        self.params, self.grads, self.m, self.v = (
            named_views(flat, sizes) for flat in (self._flat, self._grads, self._m, self._v))
        self.state = filled((layers, B, H), 0)
        self._zero_state = filled((layers, B, H), 0)
        self._evaluation_state = filled((layers, B, H), 0)
        self._dstate = ops.empty((layers, B, H), dtype)
        self._ids_tb = ops.empty((T, B), np.int32)
        self._targets_tb = ops.empty((T, B), np.int32)
        self._positions_tb = filled((T, B), np.arange(T * B).reshape(T, B), np.int32)
        self._layers = [
            _Layer(P=ops.empty_activations((V if layer == 0 else T * B, 3 * H), dtype),
                   saved=ops.gru_saved(T, B, H, dtype),
                   keep_tb=ops.empty_activations((T, B, H), bool) if dropout else None,
                   dropped_tb=ops.empty_activations((T, B, H), dtype) if dropout else None)
            for layer in range(layers)]
        self._dP = ops.empty((V, 3 * H), dtype)
        self._dP_upper = ops.empty((T * B, 3 * H), dtype) if layers > 1 else None
        self._dy_tb = ops.empty_activations((T, B, H), dtype) if layers > 1 or dropout else None
        self._dlogits_tb = ops.empty_activations((T, B, V), dtype)
        self._loss, self._norm, self._step_size = (filled((1,), 0) for _ in range(3))
        self._step_number = filled((1,), 0, np.uint64)
        # The recorded function is not bound to self: a cycle of references would keep the model's memory from being
        # freed at once.
        self._run_step_ops = ops.replayable(LanguageModel._step_ops) if graph else LanguageModel._step_ops

    def train_step(self, inputs, targets, learning_rate: float = 1e-3) -> dict:
        """One step of training: loss, gradients, clipping, Adam.

        If the gradient is not finite, parameters and moments stay as they are.

        Shapes: inputs, targets (T, B), integers in [0, V). Returns `loss`, in nats per character, and `grad_norm`,
        before clipping; `float()` gives their values.
        Raises: ValueError for arrays of another shape, for other ids, and for a learning_rate that is no finite number
        of at least 0.
        """
        _check_number("learning_rate", learning_rate, "of at least 0")
        t = self.step + 1
        step_size = learning_rate * math.sqrt(1 - BETA_2**t) / (1 - BETA_1**t)
        self._copy_in(inputs, targets)
        self.ops.copy_in(self._step_size, np.array([step_size]))
        self.ops.copy_in(self._step_number, np.array([self.step]))
        self._run_step_ops(self)
        self.step = t
        return {"loss": self.ops.read_scalar(self._loss), "grad_norm": self.ops.read_scalar(self._norm)}

    def gradients(self, inputs, targets) -> dict:
        """Loss and gradients of a window from `state`, changing neither the parameters nor the state.

        Shapes: inputs, targets (T, B). Returns `loss`, `dh0` (layers, B, H) and the gradient of every parameter by
        name, as NumPy arrays.
        Raises: ValueError as `train_step`.
        """
        self._copy_in(inputs, targets)
        self._forward(self.T, self.state, training=True)
        self._backward()
        gradients = {name: self.ops.to_host(gradient) for name, gradient in self.grads.items()}
        return {"loss": float(self.ops.read_scalar(self._loss)), "dh0": self.ops.to_host(self._dstate)} | gradients

    def evaluate(self, windows: Iterable[Batch]) -> float:
        """Mean loss in nats per character over consecutive windows, read from a zero state without dropout.

        Shapes: each window up to (T, B), with the same B in every window.
        Raises: ValueError as `train_step`, and if there is no window.
        """
        state, total, count = self._evaluation_state, 0.0, 0
        self.ops.copy(state, self._zero_state)
        for window in windows:
            T = len(window.inputs_tb)
            if not 1 <= T <= self.T:
                raise ValueError(f"windows: expected 1 to {self.T} steps, got {T}")
            self._copy_in(window.inputs_tb, window.targets_tb, T)
            self._forward(T, state, training=False)
            self._carry(T, state)
            total += float(self.ops.read_scalar(self._loss)) * window.inputs_tb.size
            count += window.inputs_tb.size
        if count == 0:
            raise ValueError("windows: expected at least one, got none")
        return total / count

    def save(self, path: Path | str, vocabulary: Vocabulary) -> None:
        """Write a checkpoint, from which `load` continues and `Generator.load` writes text: parameters, Adam's moments,
        the number of steps, and `state`. At any moment the path holds either the old file or the new one, whole.

        Raises: ValueError for a vocabulary of another size than V, and for numbers that are not finite, with which no
        file could be loaded; OSError if the file cannot be written, UserError if the path is no file.
        """
        if len(vocabulary) != self.sizes.V:
            raise ValueError(f"vocabulary: expected {self.sizes.V} characters, [UNK] included, got {len(vocabulary)}")
        params, m, v = ({name: self.ops.to_host(array).astype(np.float32) for name, array in arrays.items()}
                        for arrays in (self.params, self.m, self.v))
        state = self.ops.to_host(self.state).astype(np.float32)
        for group, arrays in (("params", params), ("m", m), ("v", v), ("state", {"state": state})):
            for name, array in arrays.items():
                if not np.isfinite(array).all():
                    raise ValueError(f"{group}: expected finite numbers, but {name} has others; {path} is as it was")
        save_checkpoint(Path(path), Checkpoint(self.sizes, vocabulary, params,
                                               Resumable(m, v, state, {"step": self.step})))

    @staticmethod
    def load(path: Path | str, T: int, B: int, **options) -> tuple[LanguageModel, Vocabulary]:
        """The model of a checkpoint, for windows of up to (T, B), and its vocabulary; path and options: as in
        `Generator.load` and of the constructor.

        A model that `save` wrote goes on exactly where it was, if T, B and the options are the same; with another B it
        starts from a zero state. A file that holds only parameters gives a model before its first step.

        Raises: UserError if there is no checkpoint, or if it cannot be used.
        """
        checkpoint = load_checkpoint(find_checkpoint(path))
        model = LanguageModel(checkpoint.sizes, T, B, np.zeros(flat_size(checkpoint.sizes), np.float32), **options)
        groups, saved = [(model.params, checkpoint.params)], checkpoint.resumable
        if saved:
            groups += [(model.m, saved.m), (model.v, saved.v)]
            model.step = saved.progress.get("step")
            if type(model.step) is not int or model.step < 0:
                raise UserError(f"{path} does not tell how many steps were trained; name another checkpoint")
            if saved.state.shape == model.state.shape:
                model.ops.copy_in(model.state, saved.state)
        for arrays, source in groups:
            for name, array in arrays.items():
                model.ops.copy_in(array, source[name])
        return model, checkpoint.vocabulary

    def reset_state(self) -> None:
        """Start the next step from a zero state."""
        self.ops.copy(self.state, self._zero_state)

    def _copy_in(self, inputs, targets, T: int | None = None) -> None:
        """Send a window of T steps (default: all) to the device.

        Raises: ValueError; a kernel would read beside its tables.
        """
        for name, ids_tb, array in (("inputs", inputs, self._ids_tb), ("targets", targets, self._targets_tb)):
            ids_tb = checked_ids(name, ids_tb, self.sizes.V)
            if ids_tb.shape != array[:T].shape:
                raise ValueError(f"{name}: expected shape {array[:T].shape}: (T, B), got {ids_tb.shape}")
            self.ops.copy_in(array[:T], ids_tb)

    def _step_ops(self) -> None:
        """All ops of a training step, which may be replayed: always the same ops on the same arrays. Numbers that
        change from step to step are in arrays."""
        self._forward(self.T, self.state if self.carry_state else self._zero_state, training=True)
        self._backward()
        self.ops.global_norm(self._grads, self._norm)
        self.ops.adam(self._flat, self._grads, self._m, self._v, self._norm, self._step_size, self.clip_norm,
                      BETA_1, BETA_2, EPSILON)
        if self.carry_state:
            self._carry(self.T, self.state)

    def _forward(self, T: int, state, training: bool) -> None:
        ops, params, ids_tb = self.ops, self.params, self._ids_tb[:T]
        x = params["W_emb"]
        for layer, buffers in enumerate(self._layers):
            P = buffers.P[:len(x)]
            ops.input_table_forward(x, params[f"W_ih.{layer}"], params[f"b_ih.{layer}"], P)
            ops.gru_forward(P, ids_tb, params[f"W_hh.{layer}"], params[f"b_hh.{layer}"], state[layer], buffers.saved)
            y_tb = buffers.saved.h_tb[1:T + 1]
            if training and self.dropout:
                ops.dropout_forward(y_tb, self.dropout, self.seed, layer, self._step_number, buffers.keep_tb,
                                    buffers.dropped_tb)
                y_tb = buffers.dropped_tb
            x, ids_tb = y_tb.reshape(T * self.B, -1), self._positions_tb[:T]
        ops.cross_entropy_forward(y_tb, params["W_out"], params["b_out"], self._targets_tb[:T], self._loss,
                                  self._dlogits_tb[:T])

    def _backward(self) -> None:
        ops, params, grads = self.ops, self.params, self.grads
        y_tb, gradients = self._output_of(self._layers[-1]), (grads["W_out"], grads["b_out"])
        if self.dropout:
            dy_tb, W_y = self._dy_tb, None
            ops.cross_entropy_backward(self._dlogits_tb, y_tb, *gradients, params["W_out"], dy_tb)
        else:
            dy_tb, W_y = self._dlogits_tb, params["W_out"]
            ops.cross_entropy_backward(self._dlogits_tb, y_tb, *gradients)
        for layer in reversed(range(self.sizes.layers)):
            buffers = self._layers[layer]
            if self.dropout:
                ops.dropout_backward(dy_tb, self.dropout, buffers.keep_tb, dy_tb)
            if layer > 0:
                y_tb = self._output_of(self._layers[layer - 1])
                ids_tb, dP, x, dx = self._positions_tb, self._dP_upper, self._rows(y_tb), self._rows(self._dy_tb)
            else:
                ids_tb, dP, x, dx = self._ids_tb, self._dP, params["W_emb"], grads["W_emb"]
            ops.gru_backward(dy_tb, W_y, ids_tb, params[f"W_hh.{layer}"], buffers.saved, dP, grads[f"W_hh.{layer}"],
                             grads[f"b_hh.{layer}"], self._dstate[layer])
            ops.input_table_backward(dP, x, params[f"W_ih.{layer}"], dx, grads[f"W_ih.{layer}"],
                                     grads[f"b_ih.{layer}"])
            dy_tb, W_y = self._dy_tb, None

    def _carry(self, T: int, state) -> None:
        for layer, buffers in enumerate(self._layers):
            self.ops.copy(state[layer], buffers.saved.h_tb[T])

    def _output_of(self, layer: _Layer):
        """What the layer or the output layer above it has read in training."""
        return layer.dropped_tb if self.dropout else layer.saved.h_tb[1:]

    def _rows(self, x_tb):
        return x_tb.reshape(self.T * self.B, -1)
