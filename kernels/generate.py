"""Drawing characters and writing text: launchers of generate.cu; `generate` calls the other variants' launchers."""

import functools
from typing import Any, NamedTuple

import numpy as np

from char_gru.kernels import runtime
from char_gru.kernels.arrays import copy
from char_gru.kernels.generate_batched import generate_batched
from char_gru.kernels.generate_one_text import generate_one_text
from char_gru.kernels.generate_persistent import generate_persistent
from char_gru.kernels.plan.generation import WEIGHTS, constants, generation_plan
from char_gru.kernels.plan.recurrence import THREADS, WARPS
from char_gru.kernels.sizes import ceil_div

GRAPH_STEPS = 8  # of a CUDA graph: 8 characters outweigh its launch, and the sampler's chunks are multiples of 8


def sample(logits, uniforms, ids, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> None:
    """Draw one character per row by inverse CDF, by the rules of `rnn.reference.sample`; `[UNK]`, id 0, is never drawn.

    Shapes: logits (R, V) float32, V at least 2; uniforms (R,) float32, in [0, 1); result ids (R,) int32.
    Raises: ValueError.
    Equals: rnn.reference.sample, except where a uniform number lies within rounding of the end of a character's share.
    """
    R, V = check_sample(logits, uniforms, ids)
    runtime.launch("generate", "sample", R, THREADS,
                   [ids, logits, uniforms, np.int32(V), *draw_options(V, temperature, top_k, top_p, min_p)],
                   constants=constants(R))


class GenerationSaved(NamedTuple):
    """Scratch arrays of `generate`.

    Shapes: h_new_r (2, R, H), new states of a layer and of the layer above it; logits_r (R, V); t (1,) int32, the
    number of the step that runs; t_before (1,) int32, the value of t before the first step, -1. graphs holds one CUDA
    graph at most, the last one that was captured, of GRAPH_STEPS steps, by the constants and arguments that are frozen
    in it.
    """

    h_new_r: Any
    logits_r: Any
    t: Any
    t_before: Any
    graphs: dict


def generation_saved(R: int, H: int, V: int, dtype=np.float32) -> GenerationSaved:
    """Arrays for `generate` with R rows."""
    return GenerationSaved(h_new_r=runtime.empty((2, R, H), dtype), logits_r=runtime.empty((R, V), dtype),
                           t=runtime.empty((1,), np.int32), t_before=runtime.to_device(np.array([-1], np.int32)),
                           graphs={})


def generate(params, P, h, ids, forced_tr, uniforms_tr, ids_tr, saved: GenerationSaved,
             temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, *, weights="fp32", variant=None) -> None:
    """Read and write R rows of text, one character per row and step.

    Each step reads the last character of each row, moves the states on and yields the next character: the forced one
    where forced_tr is not negative (prompts are read this way), else one drawn as `sample` says. Two calls, the second
    from the states and ids of the first, leave the same bits as one call of all their steps.

    weights: fp32, or bf16, which rounds W_hh, W_ih above layer 0 and W_out, so that larger models fit on chip.
    variant: for tests and benchmarks, one of `kernels.plan.generation.generation_plans`; None takes the quickest.

    Shapes: params name -> array, as `rnn.params.named_views` gives them; P (V, 3H), the input table of layer 0;
    h (layers, R, H), moved on in place; ids (R,) int32, the characters before the first step, replaced by the last
    characters; forced_tr (T, R) int32; uniforms_tr (T, R) in [0, 1); result ids_tr (T, R) int32; floating arrays are
    float32.
    Raises: ValueError.
    Equals: rnn.reference.generate, with the exception of `sample`.
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
    if weights not in WEIGHTS:
        raise ValueError(f"weights: expected {' or '.join(WEIGHTS)}, got {weights!r}")
    plan = generation_plan(runtime.current_executor().gpu, R, V, H, layers, weights, variant)
    options = draw_options(V, temperature, top_k, top_p, min_p)
    if plan.variant == "stepwise":
        _generate_stepwise(params, P, h, ids, forced_tr, uniforms_tr, ids_tr, saved, options, plan.constants)
        return
    in_one_launch = {"one-text": generate_one_text, "persistent": generate_persistent, "batched": generate_batched}
    in_one_launch[plan.variant](params, P, h, ids, forced_tr, uniforms_tr, ids_tr, options, plan)


def _generate_stepwise(params, P, h, ids, forced_tr, uniforms_tr, ids_tr, saved: GenerationSaved, options: list,
                       module: dict[str, int]) -> None:
    layers, R, H = h.shape
    V, h_of_layer, h_new = len(P), list(h), list(saved.h_new_r)
    step = []  # the launches of one step: kernel, blocks, arguments

    def add_kernel(kernel: str, columns: int, args: list) -> None:
        """Add a launch in which a warp computes one of the columns for ROWS rows."""
        warps = columns * ceil_div(R, module["ROWS"])
        step.append((kernel, ceil_div(warps, WARPS), args))

    for layer, h_layer in enumerate(h_of_layer):
        recurrence = [params[f"W_hh.{layer}"], params[f"b_hh.{layer}"], np.int32(R), np.int32(H)]
        if layer == 0:
            add_kernel("step_first", H, [h_new[0], saved.t, h_layer, P, ids, *recurrence])
        else:
            add_kernel("step_upper", H, [h_new[layer % 2], h_of_layer[layer - 1], h_layer, h_new[(layer - 1) % 2],
                                         params[f"W_ih.{layer}"], params[f"b_ih.{layer}"], *recurrence])
    add_kernel("output_layer", V, [saved.logits_r, h_of_layer[-1], h_new[(layers - 1) % 2], params["W_out"],
                                   params["b_out"], forced_tr, saved.t, np.int32(R), np.int32(V), np.int32(H)])
    step.append(("next_character", R, [ids, ids_tr, saved.logits_r, forced_tr, uniforms_tr, saved.t, np.int32(R),
                                       np.int32(V), *options]))

    def steps(count: int) -> None:
        for kernel, blocks, args in count * step:
            runtime.launch("generate", kernel, blocks, THREADS, args, constants=module)

    copy(saved.t, saved.t_before)
    graphs, remaining = divmod(len(forced_tr), GRAPH_STEPS)
    if graphs:
        fixed = (*module.values(), *(arg if isinstance(arg, np.generic) else runtime.address(arg)
                                     for kernel, blocks, args in step for arg in args))
        if fixed not in saved.graphs:
            saved.graphs.clear()
            saved.graphs[fixed] = runtime.replayable(functools.partial(steps, GRAPH_STEPS))
        for _ in range(graphs):
            saved.graphs[fixed]()
    steps(remaining)


def draw_options(V: int, temperature: float, top_k: int, top_p: float, min_p: float) -> list:
    """The scalar arguments of a kernel that draws characters."""
    return [np.float32(temperature), np.int32(min(top_k, V)), np.float32(top_p), np.float32(min_p)]


def check_sample(logits, uniforms, ids) -> tuple[int, int]:
    """Check the arrays of `sample`; returns R and V. Raises: ValueError."""
    if len(logits.shape) != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits: expected (R, V) with V of at least 2, got {logits.shape}")
    R, V = logits.shape
    runtime.check("logits", logits, np.float32, (R, V))
    runtime.check("uniforms", uniforms, np.float32, (R,))
    runtime.check("ids", ids, np.int32, (R,))
    return R, V
