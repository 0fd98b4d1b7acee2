"""Drawing characters, and writing text with a model: launchers of generate.cu and generate_persistent.cu, and the
choice among all variants."""

import functools
import operator
from typing import Any, NamedTuple

import numpy as np

from . import runtime
from .arrays import copy
from .generate_batched import FEWEST_ROWS, batched_plans, generate_batched
from .generate_plan import STATIC_SHARED_BYTES, GenerationPlan, character_cycles
from .plan import SHARED_RATE, THREADS, WARPS, rates_of
from .scratch import scratch

MAX_ROWS = 8  # that a warp multiplies its weights with; more do not fit into registers
CHUNK = 128  # k of a stage of the persistent kernel's ring
STAGES = (8, 4, 2)
GRAPH_STEPS = 8  # of one launch: its cost is little beside 8 characters, and the sampler's chunks are multiples of 8
WEIGHTS = ("fp32", "bf16")


def generation_plan(gpu: runtime.GPU, R: int, V: int, H: int, layers: int, weights: str = "fp32",
                    variant: str | None = None) -> GenerationPlan:
    """The quickest of `generation_plans`, or that of a variant.

    Raises: ValueError for a variant that is not among them.
    """
    plans = generation_plans(gpu, R, V, H, layers, weights)
    for plan in plans:
        if variant in (None, plan.variant):
            return plan
    expected = " or ".join(plan.variant for plan in plans)
    raise ValueError(f"variant: expected {expected}, got {variant!r}: {plans[-1].reason}")


@functools.lru_cache
def generation_plans(gpu: runtime.GPU, R: int, V: int, H: int, layers: int,
                     weights: str = "fp32") -> tuple[GenerationPlan, ...]:
    """The best plan of each variant that there is for these sizes, the quickest first: persistent and batched where a
    GPU holds all weights on chip, and then stepwise, for any."""
    persistent, least = _persistent_plans(gpu, R, V, H, layers, weights)
    batched = sorted(batched_plans(gpu, R, V, H, layers, weights), key=operator.itemgetter(0))[:1]
    on_chip = sorted(persistent + batched, key=operator.itemgetter(0))
    megahertz = rates_of(gpu).gigahertz * 1000
    predicted = ", ".join(f"{plan.variant} {cycles / megahertz:.1f} us" for cycles, plan in on_chip)
    predicted += " a character" + ("; batched is for one layer" if layers > 1 and R >= FEWEST_ROWS else "")
    plans = [plan._replace(reason=f"{plan.reason}; predicted: {predicted}") for _, plan in on_chip]
    misfit = (f"a block's share of {weights} weights and states takes {least / 1024:.0f} KiB of shared memory; "
              f"{gpu.name} has {gpu.shared_bytes / 1024:.0f}")
    return *plans, GenerationPlan("stepwise", "for any sizes" if persistent else misfit, constants(R, weights))


def _persistent_plans(gpu: runtime.GPU, R: int, V: int, H: int, layers: int,
                      weights: str) -> tuple[list[tuple[float, GenerationPlan]], int]:
    """Cycles of a character, and plan, of the best cut, if one fits; and the least shared memory that any takes.

    More groups read fewer states, each its own, but hold the weights as many times: of the numbers of groups that fit
    and leave each MAX_ROWS rows, the largest whose blocks have the least to multiply.
    """
    most = max(1, min(R // MAX_ROWS, gpu.multiprocessors))
    plans = [_persistent_plan(gpu, -(-R // groups), R, V, H, layers, weights) for groups in range(1, most + 1)]
    fitting = [(work, plan) for work, plan in plans if plan.shared_bytes + STATIC_SHARED_BYTES <= gpu.shared_bytes]
    best = [plan for _, plan in sorted(fitting, key=lambda fit: (fit[0], -fit[1].groups))[:1]]
    return [(_persistent_cycles(gpu, plan, V, H, layers), plan) for plan in best], min(
        plan.shared_bytes for work, plan in plans)


def _persistent_plan(gpu: runtime.GPU, group_rows: int, R: int, V: int, H: int, layers: int,
                     weights: str) -> tuple[int, GenerationPlan]:
    """What a warp multiplies per k, and the plan with groups of so many rows, in as many stages as fit."""
    width, groups, rows = _width(H), -(-R // group_rows), _tile_rows(group_rows)
    # With fewer units than warps in a block, warps would idle, and drawing would have more parts to sum.
    units = max(WARPS, -(-width // (gpu.multiprocessors // groups)))
    blocks, row_tiles = -(-width // units), -(-group_rows // rows)
    # A tile of 3 * tile_units gates by rows needs as many loads from shared memory as their sum, for as many products
    # as their product: the larger the better, as long as there are tiles for the warps.
    tile_units = 1 if rows < MAX_ROWS else 4 if row_tiles * -(-units // 4) >= WARPS else 2
    unit_tiles = -(-units // tile_units)
    stage_rows = rows * min(row_tiles, max(1, WARPS // unit_tiles))
    passes = -(-group_rows // stage_rows) * -(-unit_tiles // WARPS)
    for stages in STAGES:
        module = constants(group_rows, weights) | {"UNITS": tile_units, "STAGES": stages}
        shared_bytes = _shared_bytes(V, width, layers, units, group_rows, stage_rows, module)
        if shared_bytes + STATIC_SHARED_BYTES <= gpu.shared_bytes:
            break
    reason = f"{groups} x {blocks} blocks hold {weights} weights on chip, in {shared_bytes / 1024:.0f} KiB each"
    return passes * tile_units * rows, GenerationPlan("persistent", reason, module, groups, group_rows, blocks, units,
                                                      stage_rows, shared_bytes)


def _persistent_cycles(gpu: runtime.GPU, plan: GenerationPlan, V: int, H: int, layers: int) -> float:
    """Of a character: a product takes the longest of gathering the states, multiplying, and reading both operands from
    shared memory, tile by tile."""
    rates, width, rows, units = rates_of(gpu), _width(H), plan.constants["ROWS"], plan.constants["UNITS"]
    rounds, passes = -(-plan.units // (units * WARPS)), -(-plan.group_rows // plan.stage_rows)
    tiles, gates = passes * rounds * WARPS, 3 * units
    gather = rounds * plan.group_rows * width * 4 / rates.l2
    multiply = tiles * gates * rows * width / rates.multiply["fp32"]
    shared = tiles * (gates / (1 + plan.constants["BF16"]) + rows) * width * 4 / SHARED_RATE
    return character_cycles(gpu, plan, V, layers, max(gather, multiply, shared))


def _shared_bytes(V: int, width: int, layers: int, units: int, group_rows: int, stage_rows: int,
                  module: dict[str, int]) -> int:
    """Dynamic shared memory of write_text, in its order."""
    matrices, gates, padded_rows, quads = 2 * layers - 1, 3 * units, _round_up(group_rows, module["ROWS"]), -(-V // 4)
    floats = [matrices * gates * width // (1 + module["BF16"]), module["STAGES"] * stage_rows * CHUNK,
              max(THREADS // quads, 1) * 4 * quads, layers * units * padded_rows, V * gates, V * units,
              matrices * gates, min(layers, 2) * gates * (padded_rows | 1)]
    return 4 * sum(floats)


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
    """Room for `generate` to work in: h_new_r (2, R, H), new states on their way to the next layer; logits_r (R, V);
    counters (R, 32), of the barriers of up to R groups, zero between two launches; t (1,) and t_before (1,), the number
    of a step, and what it is before the first, -1; graphs, GRAPH_STEPS steps that can be repeated, by all that is fixed
    in them: those of the last call that had so many."""

    h_new_r: Any
    logits_r: Any
    counters: Any
    t: Any
    t_before: Any
    graphs: dict


def generation_saved(R: int, H: int, V: int, dtype=np.float32) -> GenerationSaved:
    """Arrays for `generate` with R rows."""
    return GenerationSaved(h_new_r=runtime.empty((2, R, H), dtype), logits_r=runtime.empty((R, V), dtype),
                           counters=runtime.zeros((R, 32), np.uint32), t=runtime.empty((1,), np.int32),
                           t_before=runtime.to_device(np.array([-1], np.int32)), graphs={})


def generate(params, P, h, ids, forced_tr, uniforms_tr, ids_tr, saved: GenerationSaved,
             temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, *, weights="fp32", variant=None) -> None:
    """Read and write R rows of text, one character per row and step.

    Each step reads the character before, moves the states on and yields the next character: the forced one where
    forced_tr is not negative (that is how prompts are read), else one drawn as `sample` says.

    weights: bf16 rounds W_hh, W_ih above layer 0 and W_out, and nothing else, so that larger models fit on chip.
    variant: persistent, batched (one layer, from 9 rows on, tensor cores) or stepwise; None takes what
    `generation_plan` says. Calls that continue each other leave the same bits as one call.

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
    runtime.check("counters", saved.counters, np.uint32, (R, 32))
    if weights not in WEIGHTS:
        raise ValueError(f"weights: expected {' or '.join(WEIGHTS)}, got {weights!r}")
    plan = generation_plan(runtime.current_executor().gpu, R, V, H, layers, weights, variant)
    options = _options(V, temperature, top_k, top_p, min_p)
    if plan.variant == "stepwise":
        _generate_stepwise(params, P, h, ids, forced_tr, uniforms_tr, ids_tr, saved, options, plan.constants)
        return
    on_chip = generate_batched if plan.variant == "batched" else _generate_persistent
    on_chip(params, P, h, ids, forced_tr, uniforms_tr, ids_tr, saved.counters, options, plan)


def _generate_persistent(params, P, h, ids, forced_tr, uniforms_tr, ids_tr, counters, options: list,
                         plan: GenerationPlan) -> None:
    layers, R, H = h.shape
    if len(forced_tr) == 0:
        return
    T, V, width, matrices, padded_units = len(forced_tr), len(P), _width(H), 2 * layers - 1, plan.blocks * plan.units
    weights = scratch("generate weights", (matrices, padded_units, 3, width // (1 + plan.constants["BF16"])), np.uint32)
    biases = scratch("generate biases", (matrices, padded_units, 3))
    states = scratch("generate states", (2, layers, R, width))
    logits = scratch("generate logits", (plan.groups * plan.blocks, plan.group_rows, _round_up(V, 4)), zeros=True)
    for matrix in range(matrices):
        of = f"hh.{matrix // 2}" if matrix % 2 == 0 else f"ih.{matrix // 2 + 1}"
        runtime.launch("generate_persistent", "pack", -(-weights[matrix].size // THREADS), THREADS,
                       [weights[matrix], biases[matrix], params[f"W_{of}"], params[f"b_{of}"], np.int32(H),
                        np.int32(width), np.int32(padded_units)], constants=plan.constants)
    sizes = [T, R, V, H, layers, plan.group_rows, plan.units, plan.stage_rows]
    runtime.launch("generate_persistent", "write_text", plan.groups * plan.blocks, THREADS,
                   [h, ids, ids_tr, states, logits, counters, weights, biases, P, params["W_out"], params["b_out"],
                    forced_tr, uniforms_tr, *map(np.int32, sizes), *options],
                   constants=plan.constants, shared_bytes=plan.shared_bytes, cooperative=True)


def _generate_stepwise(params, P, h, ids, forced_tr, uniforms_tr, ids_tr, saved: GenerationSaved, options: list,
                       module: dict[str, int]) -> None:
    layers, R, H = h.shape
    V, h_of_layer, h_new = len(P), list(h), list(saved.h_new_r)
    step = []  # its launches: kernel, blocks, arguments

    def of_warps(kernel: str, outputs: int, args: list) -> None:
        """A kernel of which a warp owns one of the `outputs` of ROWS rows."""
        warps = outputs * -(-R // module["ROWS"])
        step.append((kernel, -(-warps // WARPS), args))

    for layer, h_layer in enumerate(h_of_layer):
        recurrence = [params[f"W_hh.{layer}"], params[f"b_hh.{layer}"], np.int32(R), np.int32(H)]
        if layer == 0:
            of_warps("step_first", H, [h_new[0], saved.t, h_layer, P, ids, *recurrence])
        else:
            of_warps("step_upper", H, [h_new[layer % 2], h_of_layer[layer - 1], h_layer, h_new[(layer - 1) % 2],
                                       params[f"W_ih.{layer}"], params[f"b_ih.{layer}"], *recurrence])
    of_warps("output_layer", V, [saved.logits_r, h_of_layer[-1], h_new[(layers - 1) % 2], params["W_out"],
                                 params["b_out"], forced_tr, saved.t, np.int32(R), np.int32(V), np.int32(H)])
    step.append(("next_character", R, [ids, ids_tr, saved.logits_r, forced_tr, uniforms_tr, saved.t, np.int32(R),
                                       np.int32(V), *options]))

    def steps(count: int) -> None:
        for kernel, blocks, args in count * step:
            runtime.launch("generate", kernel, blocks, THREADS, args, constants=module)

    copy(saved.t, saved.t_before)
    graphs, others = divmod(len(forced_tr), GRAPH_STEPS)
    if graphs:
        fixed = (*module.values(), *(arg if isinstance(arg, np.generic) else runtime.address(arg)
                                     for kernel, blocks, args in step for arg in args))
        if fixed not in saved.graphs:
            saved.graphs.clear()
            saved.graphs[fixed] = runtime.replayable(functools.partial(steps, GRAPH_STEPS))
        for _ in range(graphs):
            saved.graphs[fixed]()
    steps(others)


def constants(R: int, weights: str = "fp32") -> dict[str, int]:
    """What generate.cu is compiled with, and generate_persistent.cu for groups of R rows, with UNITS and STAGES."""
    return {"ROWS": _tile_rows(R), "BF16": int(weights == "bf16")}


def _tile_rows(R: int) -> int:
    """The power of two that is enough for R rows, up to MAX_ROWS."""
    return min(1 << (R - 1).bit_length(), MAX_ROWS)


def _width(H: int) -> int:
    """Units of a layer with those that pad it, so that rows of bf16 are multiples of 16 bytes."""
    return _round_up(H, 8)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _options(V: int, temperature: float, top_k: int, top_p: float, min_p: float) -> list:
    return [np.float32(temperature), np.int32(min(top_k, V)), np.float32(top_p), np.float32(min_p)]


def _rows_and_characters(logits) -> tuple[int, int]:
    if len(logits.shape) != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits: expected (R, V) with V of at least 2, got {logits.shape}")
    return logits.shape
