"""Launchers of generate.cu: drawing characters, and writing text with a model."""

from typing import Any, NamedTuple

import numpy as np

from . import runtime

THREADS = 256
MAX_ROWS = 8  # that a warp multiplies its weights with; more do not fit into registers


def sample(logits, uniforms, ids, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> None:
    """Draw one character per row by inverse CDF; `[UNK]`, id 0, is never drawn.

    The logits are divided by the temperature (0 takes the most likely character, the first of several). Then only
    these characters stay: the top_k most likely (0: all; equal ones in the order of their ids); of those, the fewest
    most likely ones whose share reaches top_p; of those, the ones at least min_p times as likely as the most likely.
    The character drawn is the first whose cumulative share, in the order of ids, exceeds the row's uniform number.

    Shapes: logits (R, V), V at least 2; uniforms (R,), in [0, 1); result ids (R,), int32.
    Raises: ValueError.
    Equals: rnn.reference.sample, but for numbers within rounding of where one character's share ends.
    """
    R, V = _rows_and_characters(logits)
    runtime.check("logits", logits, np.float32, (R, V))
    runtime.check("uniforms", uniforms, np.float32, (R,))
    runtime.check("ids", ids, np.int32, (R,))
    runtime.launch("generate", "sample", R, THREADS,
                   [ids, logits, uniforms, np.int32(V), *_options(V, temperature, top_k, top_p, min_p)],
                   constants=constants(R))


class GenerationSaved(NamedTuple):
    """Room for `generate` to work in: h_new_r (2, R, H), new states on their way to the next layer; logits_r (R, V)."""

    h_new_r: Any
    logits_r: Any


def generation_saved(R: int, H: int, V: int, dtype=np.float32) -> GenerationSaved:
    """Arrays for `generate` with R rows."""
    return GenerationSaved(h_new_r=runtime.empty((2, R, H), dtype), logits_r=runtime.empty((R, V), dtype))


def generate(params, P, h, ids, forced_tr, uniforms_tr, ids_tr, saved: GenerationSaved,
             temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> None:
    """Read and write R rows of text, one character per row and step.

    Each step reads the character before, moves the states on and yields the next character: the forced one where
    forced_tr is not negative (that is how prompts are read), else one drawn as `sample` says.

    Shapes: params name -> array, as `rnn.params.named_views` gives them; P (V, 3H), the input table of layer 0;
    h (layers, R, H), moved on in place; ids (R,) int32, the characters before the first step, replaced by the last
    ones; forced_tr (T, R) int32; uniforms_tr (T, R) in [0, 1); result ids_tr (T, R) int32.
    Raises: ValueError.
    Equals: rnn.reference.generate, but for what `sample` says.
    """
    layers, R, H = h.shape
    T, V = len(forced_tr), len(P)
    shapes = {"W_out": (V, H), "b_out": (V,)}
    for layer in range(layers):
        shapes |= {f"W_hh.{layer}": (3 * H, H), f"b_hh.{layer}": (3 * H,)}
        if layer > 0:
            shapes |= {f"W_ih.{layer}": (3 * H, H), f"b_ih.{layer}": (3 * H,)}
    for name, shape in shapes.items():
        runtime.check(name, params[name], np.float32, shape)
    for name, array, shape in (("P", P, (V, 3 * H)), ("h", h, (layers, R, H)), ("uniforms_tr", uniforms_tr, (T, R)),
                               ("h_new_r", saved.h_new_r, (2, R, H)), ("logits_r", saved.logits_r, (R, V))):
        runtime.check(name, array, np.float32, shape)
    for name, array, shape in (("ids", ids, (R,)), ("forced_tr", forced_tr, (T, R)), ("ids_tr", ids_tr, (T, R))):
        runtime.check(name, array, np.int32, shape)
    module, options = constants(R), _options(V, temperature, top_k, top_p, min_p)
    h_of_layer, h_new = list(h), list(saved.h_new_r)

    def launch(kernel: str, outputs: int, args: list) -> None:
        """A kernel of which a warp owns one of the `outputs` of ROWS rows."""
        warps = outputs * -(-R // module["ROWS"])
        runtime.launch("generate", kernel, -(-warps // (THREADS // 32)), THREADS, args, constants=module)

    for t in range(T):
        for layer, h_layer in enumerate(h_of_layer):
            recurrence = [params[f"W_hh.{layer}"], params[f"b_hh.{layer}"], np.int32(R), np.int32(H)]
            if layer == 0:
                launch("step_first", H, [h_new[0], h_layer, P, ids, *recurrence])
            else:
                launch("step_upper", H, [h_new[layer % 2], h_of_layer[layer - 1], h_layer, h_new[(layer - 1) % 2],
                                         params[f"W_ih.{layer}"], params[f"b_ih.{layer}"], *recurrence])
        step = [np.int32(t), np.int32(R), np.int32(V)]
        launch("output_layer", V, [saved.logits_r, h_of_layer[-1], h_new[(layers - 1) % 2], params["W_out"],
                                   params["b_out"], forced_tr, *step, np.int32(H)])
        runtime.launch("generate", "next_character", R, THREADS,
                       [ids, ids_tr, saved.logits_r, forced_tr, uniforms_tr, *step, *options], constants=module)


def constants(R: int) -> dict[str, int]:
    """What generate.cu is compiled with: ROWS is the power of two that is enough for R rows, up to MAX_ROWS."""
    return {"THREADS": THREADS, "ROWS": min(1 << (R - 1).bit_length(), MAX_ROWS), "BF16": 0}


def _options(V: int, temperature: float, top_k: int, top_p: float, min_p: float) -> list:
    return [np.float32(temperature), np.int32(min(top_k, V)), np.float32(top_p), np.float32(min_p)]


def _rows_and_characters(logits) -> tuple[int, int]:
    if len(logits.shape) != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits: expected (R, V) with V of at least 2, got {logits.shape}")
    return logits.shape
