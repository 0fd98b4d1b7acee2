"""A model as an ONNX graph: the generator, a `Scan` over time that also draws the characters, or the network alone.

Integers are int32, as the ids of `rnn.reference.generate`; a browser has them as plain numbers, and int64 as big
integers. Every matrix is an initializer in the layout of the operator that reads it, so that onnxruntime packs it when
it loads the file, and no step does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.helper import make_node

from char_gru.rnn.checkpoint import Checkpoint
from char_gru.rnn.config import Sizes, UserError
from char_gru.rnn.params import gates_z_first

OPSET, IR_VERSION = 17, 8
"""Versions of the operators and of the file, old enough for onnxruntime from 1.20 on."""

LARGEST = 2**31 - 2**20
"""The most bytes of parameters: a file of ONNX holds less than 2 GiB."""

OPTIONS = {"temperature": np.float32(1), "top_k": np.int32(0), "top_p": np.float32(1), "min_p": np.float32(0)}
"""Inputs that a caller may leave out, and their values then."""

GENERATOR = """\
A character-level GRU that writes B texts, T characters of each in a call (B and T at least 1). The id of a character
(a Unicode code point) is its place in vocabulary, counted from 1; 0 is an unknown character, and never drawn.
vocabulary, beginning and sizes are JSON.
Inputs: ids (B) int32, the first character of each text, or last_ids of the call before; state (layers, B, H) float32,
zeros, or state_out of the call before; forced_tr (T, B) int32, the characters to read next, -1 where one is drawn;
uniforms_tr (T, B) float32 in [0, 1), the random number by which each character is drawn. A prompt is its first
character in ids and the others in forced_tr; beginning stands for an empty one.
Inputs that may be left out: temperature (1; float32, finite, at least 0: 0 takes the most likely character), top_k (0;
int32, at least 0: 0 keeps all characters), top_p (1; float32 in (0, 1]), min_p (0; float32 in [0, 1]).
Outputs: ids_tr (T, B) int32, the characters read or drawn; state_out; last_ids (B).
An id below 0 in ids is read as 0, an id of V or more as V-1. The graph cannot refuse a number that is out of range,
such as a temperature below 0 or a uniform number of 1: check them before, or the characters mean nothing."""

OF_BYTES = """
Each character of this model stands for the byte of its code point, U+0000 to U+00FF."""

NETWORK = """\
A character-level GRU that predicts characters. The id of a character (a Unicode code point) is its place in
vocabulary, counted from 1; 0 is an unknown character. vocabulary, beginning and sizes are JSON.
Inputs: ids_tb (T, B) int32, T characters of B texts; state (layers, B, H) float32, zeros, or state_out of the call
before. Outputs: logits_tbv (T, B, V) float32, whose softmax over V gives the probabilities of the character after each;
state_out.
An id below 0 is read as 0, an id of V or more as V-1."""


def onnx_bytes(checkpoint: Checkpoint, logits: bool) -> bytes:
    """The file of a model in the format of ONNX, checked by `onnx.checker`.

    With `logits`, the network alone: inputs ids_tb (T, B) int32, state (layers, B, H) float32; outputs logits_tbv
    (T, B, V), state_out. Else the generator, as `rnn.reference.generate`: inputs ids (B), state, forced_tr (T, B),
    uniforms_tr (T, B) float32, and the scalars of `OPTIONS`; outputs ids_tr (T, B), state_out, last_ids (B). T and B
    are free in each call. `metadata_props` has vocabulary (the characters in the order of their ids, from 1),
    beginning and sizes, all as JSON, and how_to.

    Raises: UserError for a model that is too large for the format.
    """
    sizes, vocabulary, params = checkpoint.sizes, checkpoint.vocabulary, checkpoint.params
    if sum(array.nbytes for array in params.values()) > LARGEST:
        raise UserError("this model is too large for .onnx, which holds less than 2 GiB; export it as .safetensors")
    graph = _network(sizes, params) if logits else _generator(sizes, params)
    how_to = (NETWORK if logits else GENERATOR) + (OF_BYTES if vocabulary.of_bytes else "")
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION,
                              producer_name="char-gru")
    helper.set_model_props(model, {
        "vocabulary": json.dumps(vocabulary.characters), "beginning": json.dumps(vocabulary.beginning),
        "sizes": json.dumps(asdict(sizes)), "how_to": how_to})
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def _generator(sizes: Sizes, params: dict[str, np.ndarray]) -> onnx.GraphProto:
    """The graph of the generator. The output layer has no row of `[UNK]`, so that it is never drawn."""
    layers, known = range(sizes.layers), sizes.V - 1
    constants = _weights(sizes, params) | OPTIONS | {
        "W_out": params["W_out"][1:].T, "b_out": params["b_out"][1:], "ranks": np.arange(known, dtype=np.int32),
        "known": np.array([known]), "last": np.array([-1]), "cumsum_axis": np.array(1), "one_float": np.float32(1),
        "two_float": np.float32(2)}
    nodes = [
        *_clamped("ids", "ids_0"),
        make_node("Min", ["forced_tr", "last_id"], ["forced_clamped_tr"]),
        # At temperature 0, the one most likely character is kept, whatever its share.
        make_node("Equal", ["temperature", "zero_float"], ["greedy"]),
        make_node("Where", ["greedy", "one_float", "temperature"], ["divisor"]),
        make_node("Where", ["greedy", "one", "top_k"], ["k"]),
        make_node("Less", ["ranks", "k"], ["below_k"]),
        make_node("Equal", ["k", "zero"], ["no_top_k"]),
        make_node("Or", ["below_k", "no_top_k"], ["in_top_k"]),
        # A share of 2 keeps all characters: with 1, rounding would drop the least likely ones.
        make_node("Less", ["top_p", "one_float"], ["some_top_p"]),
        make_node("Where", ["some_top_p", "top_p", "two_float"], ["share"]),
        *_split_state(sizes),
        make_node("Scan", [*(f"state_{layer}" for layer in layers), "ids_0", "forced_clamped_tr", "uniforms_tr"],
                  [*(f"last_h_{layer}" for layer in layers), "last_ids", "ids_tr"],
                  body=_step(sizes), num_scan_inputs=2),
        make_node("Concat", [f"last_h_{layer}" for layer in layers], ["state_out"], axis=0),
    ]
    state = (sizes.layers, "B", sizes.H)
    inputs = [_int("ids", "B"), _float("state", *state), _int("forced_tr", "T", "B"), _float("uniforms_tr", "T", "B"),
              _float("temperature"), _int("top_k"), _float("top_p"), _float("min_p")]
    outputs = [_int("ids_tr", "T", "B"), _float("state_out", *state), _int("last_ids", "B")]
    return helper.make_graph(nodes, "generator", inputs, outputs, _tensors(constants))


def _step(sizes: Sizes) -> onnx.GraphProto:
    """The body of the `Scan`: from states h_<layer> (1, B, H), ids, forced and uniforms (B) to the new states, the new
    ids, and these as an element of ids_tr. Weights and options are those of the outer graph."""
    layers = range(sizes.layers)
    nodes = [
        make_node("Unsqueeze", ["ids", "axis_0"], ["ids_tb"]),
        make_node("Gather", ["W_emb", "ids_tb"], ["x_0"]),
        *(_gru(sizes.H, layer, f"x_{layer}", f"h_{layer}", "", f"x_{layer + 1}") for layer in layers),
        make_node("Squeeze", [f"x_{sizes.layers}", "axis_0"], ["y"]),
        make_node("MatMul", ["y", "W_out"], ["products"]),
        make_node("Add", ["products", "b_out"], ["logits"]),
        *_draw(),
        make_node("Less", ["forced", "zero"], ["free"]),
        make_node("Where", ["free", "drawn", "forced"], ["new_ids"]),
        make_node("Identity", ["new_ids"], ["ids_t"]),
    ]
    states = [_float(f"h_{layer}", 1, "B", sizes.H) for layer in layers]
    new_states = [_float(f"x_{layer + 1}", 1, "B", sizes.H) for layer in layers]
    return helper.make_graph(nodes, "step", [*states, _int("ids", "B"), _int("forced", "B"), _float("uniforms", "B")],
                             [*new_states, _int("new_ids", "B"), _int("ids_t", "B")])


def _draw() -> Iterator[onnx.NodeProto]:
    """From logits (B, V-1) and uniforms (B) to drawn (B), as `rnn.reference.sample`."""
    # The likeliest character first, equally likely ones by id; the filters run in this order.
    yield make_node("TopK", ["logits", "known"], ["ranked_logits", "order"])
    yield make_node("ReduceMax", ["ranked_logits"], ["largest"], axes=[1])
    yield make_node("Sub", ["ranked_logits", "largest"], ["differences"])
    yield make_node("Div", ["differences", "divisor"], ["log_ratios"])
    yield make_node("Exp", ["log_ratios"], ["ranked"])
    yield make_node("Where", ["in_top_k", "ranked", "zero_float"], ["kept_k"])
    yield make_node("CumSum", ["kept_k", "cumsum_axis"], ["reached"])
    yield make_node("CumSum", ["kept_k", "cumsum_axis"], ["before"], exclusive=1)
    yield make_node("Gather", ["reached", "last"], ["all_kept"], axis=1)
    yield make_node("Mul", ["all_kept", "share"], ["wanted"])
    yield make_node("Less", ["before", "wanted"], ["in_top_p"])
    yield make_node("Where", ["in_top_p", "kept_k", "zero_float"], ["kept_p"])
    yield make_node("Less", ["kept_p", "min_p"], ["too_small"])
    yield make_node("Where", ["too_small", "zero_float", "kept_p"], ["kept"])
    # In the order of ids again: every logit is overwritten.
    yield make_node("ScatterElements", ["logits", "order", "kept"], ["p"], axis=1)
    yield make_node("CumSum", ["p", "cumsum_axis"], ["cumulative"])
    yield make_node("Gather", ["cumulative", "last"], ["total"], axis=1)
    yield make_node("Unsqueeze", ["uniforms", "axis_1"], ["uniforms_column"])
    yield make_node("Mul", ["total", "uniforms_column"], ["threshold"])
    yield make_node("Greater", ["cumulative", "threshold"], ["exceeds"])
    yield make_node("Cast", ["exceeds"], ["exceeds_int"], to=TensorProto.INT32)  # ArgMax takes no bool
    yield make_node("ArgMax", ["exceeds_int"], ["place"], axis=1, keepdims=0)
    yield make_node("Cast", ["place"], ["place_int"], to=TensorProto.INT32)
    yield make_node("Add", ["place_int", "one"], ["drawn"])


def _network(sizes: Sizes, params: dict[str, np.ndarray]) -> onnx.GraphProto:
    """The graph of the network alone."""
    layers = range(sizes.layers)
    constants = _weights(sizes, params) | {"W_out": params["W_out"].T, "b_out": params["b_out"]}
    nodes = [*_clamped("ids_tb", "ids_clamped_tb"), make_node("Gather", ["W_emb", "ids_clamped_tb"], ["x_0"]),
             *_split_state(sizes)]
    for layer in layers:
        nodes += [_gru(sizes.H, layer, f"x_{layer}", f"state_{layer}", f"y_{layer}", f"last_h_{layer}"),
                  make_node("Squeeze", [f"y_{layer}", "axis_1"], [f"x_{layer + 1}"])]  # the axis of directions
    nodes += [make_node("MatMul", [f"x_{sizes.layers}", "W_out"], ["products"]),
              make_node("Add", ["products", "b_out"], ["logits_tbv"]),
              make_node("Concat", [f"last_h_{layer}" for layer in layers], ["state_out"], axis=0)]
    state = (sizes.layers, "B", sizes.H)
    return helper.make_graph(nodes, "network", [_int("ids_tb", "T", "B"), _float("state", *state)],
                             [_float("logits_tbv", "T", "B", sizes.V), _float("state_out", *state)],
                             _tensors(constants))


def _weights(sizes: Sizes, params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Embedding and GRU layers as initializers, and the small constants of both graphs."""
    weights = {"W_emb": params["W_emb"], "last_id": np.int32(sizes.V - 1), "zero": np.int32(0), "one": np.int32(1),
               "zero_float": np.float32(0), "axis_0": np.array([0]), "axis_1": np.array([1]),
               "ones": np.ones(sizes.layers, np.int64)}
    for layer in range(sizes.layers):
        W_ih, W_hh, b_ih, b_hh = (gates_z_first(params[f"{name}.{layer}"]) for name in ("W_ih", "W_hh", "b_ih", "b_hh"))
        weights |= {f"W_ih_{layer}": W_ih[None], f"W_hh_{layer}": W_hh[None],
                    f"b_{layer}": np.concatenate([b_ih, b_hh])[None]}
    return weights


def _gru(H: int, layer: int, x_tb: str, h: str, y_tb: str, last_h: str) -> onnx.NodeProto:
    """A layer over a sequence: from x_tb (T, B, E or H) and h (1, B, H) to y_tb (T, 1, B, H), last_h (1, B, H)."""
    return make_node("GRU", [x_tb, f"W_ih_{layer}", f"W_hh_{layer}", f"b_{layer}", "", h], [y_tb, last_h],
                     hidden_size=H, linear_before_reset=1)


def _clamped(ids: str, clamped: str) -> list[onnx.NodeProto]:
    """Ids in [0, V)."""
    return [make_node("Max", [ids, "zero"], [f"{ids}_from_0"]),
            make_node("Min", [f"{ids}_from_0", "last_id"], [clamped])]


def _split_state(sizes: Sizes) -> list[onnx.NodeProto]:
    """State (layers, B, H) as state_<layer> (1, B, H)."""
    return [make_node("Split", ["state", "ones"], [f"state_{layer}" for layer in range(sizes.layers)], axis=0)]


def _int(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.INT32, shape)


def _float(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _tensors(constants: dict[str, np.ndarray]) -> list[onnx.TensorProto]:
    return [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
