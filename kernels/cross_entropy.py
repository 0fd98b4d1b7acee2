"""Launchers of cross_entropy.cu, and the gradients of the output layer's parameters, a product and a sum."""

import numpy as np

from char_gru.kernels import runtime
from char_gru.kernels.matmul import TILE_THREADS, aligned, column_sums, constants, matmul
from char_gru.kernels.plan.products import MULTISTAGE_CAPABILITY, OUTPUT_K, TILED_OUTPUT, OutputTile, output_tile
from char_gru.kernels.scratch import scratch
from char_gru.kernels.sizes import ceil_div

MEAN_THREADS = 1024  # of the one block of mean_loss
VARIANTS = ("tiled", "multistage")


def cross_entropy_constants(precision: str, tile: OutputTile) -> dict[str, int]:
    """The constants of cross_entropy.cu."""
    return constants(precision) | {"TILE_M": tile.rows, "TILE_N": tile.columns, "TILE_K": OUTPUT_K,
                                   "STAGES": tile.stages}


def cross_entropy_forward(h_tb, W_out, b_out, targets_tb, loss, dlogits_tb, *, precision="fp32", variant=None,
                          tile: OutputTile | None = None) -> None:
    """Output layer, softmax and mean cross-entropy, and the gradient of this loss with respect to the logits.
    `variant` and `tile` are for tests and benchmarks.

    Shapes: h_tb (T, B, H); W_out (V, H); b_out (V,); targets_tb (T, B) int32, in [0, V); results loss (1,), in nats per
    character, and dlogits_tb (T, B, V); floating arrays are float32.
    Raises: ValueError.
    Equals: logits = h W_out^T + b_out, loss = mean(log(sum(exp(logits))) - logits[target]),
    dlogits_tb = (softmax(logits) - onehot(target)) / (T*B).
    """
    check_cross_entropy_forward(h_tb, W_out, b_out, targets_tb, loss, dlogits_tb)
    (T, B, H), V = h_tb.shape, len(W_out)
    gpu = runtime.current_executor().gpu
    if variant is None:
        can = aligned(h_tb) and aligned(W_out) and gpu.capability >= MULTISTAGE_CAPABILITY
        variant = "multistage" if can else "tiled"
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
    tile = tile or (output_tile(gpu, T * B, V, precision) if variant == "multistage" else TILED_OUTPUT)
    module = cross_entropy_constants(precision, tile)
    losses = scratch("cross_entropy_forward", (T * B,))
    runtime.launch("cross_entropy", "cross_entropy_forward", ceil_div(T * B, tile.rows), TILE_THREADS,
                   [dlogits_tb, losses, h_tb, W_out, b_out, targets_tb, np.int32(T * B), np.int32(V), np.int32(H)],
                   constants=module, shared_bytes=tile.shared_bytes)
    runtime.launch("cross_entropy", "mean_loss", 1, MEAN_THREADS, [loss, losses, np.int32(T * B)], constants=module)


def cross_entropy_backward(dlogits_tb, h_tb, dW_out, db_out, W_out=None, dh_tb=None, *, precision="fp32") -> None:
    """Gradients of the output layer's parameters and, where W_out is given, of h_tb: dlogits_tb W_out. Else
    `gru_backward` computes that product, fused, unless dropout lies between the two.

    Shapes: dlogits_tb (T, B, V); h_tb (T, B, H); W_out (V, H); results dW_out (V, H), db_out (V,), and with W_out
    dh_tb (T, B, H); all float32.
    Raises: ValueError.
    Equals: dlogits^T h and dlogits, summed over positions, and dlogits W_out.
    """
    check_cross_entropy_backward(dlogits_tb, h_tb, dW_out, db_out, W_out, dh_tb)
    (T, B, V), H = dlogits_tb.shape, h_tb.shape[2]
    dlogits = dlogits_tb.reshape(T * B, V)
    matmul(dlogits, h_tb.reshape(T * B, H), dW_out, transpose_a=True, precision=precision)
    column_sums(dlogits, db_out)
    if W_out is not None:
        matmul(dlogits, W_out, dh_tb.reshape(T * B, H), precision=precision)


def check_cross_entropy_forward(h_tb, W_out, b_out, targets_tb, loss, dlogits_tb) -> None:
    """Check the arrays of `cross_entropy_forward`. Raises: ValueError."""
    (T, B, H), V = h_tb.shape, len(W_out)
    runtime.check("h_tb", h_tb, np.float32, (T, B, H))
    runtime.check("W_out", W_out, np.float32, (V, H))
    runtime.check("b_out", b_out, np.float32, (V,))
    runtime.check("targets_tb", targets_tb, np.int32, (T, B))
    runtime.check("loss", loss, np.float32, (1,))
    runtime.check("dlogits_tb", dlogits_tb, np.float32, (T, B, V))


def check_cross_entropy_backward(dlogits_tb, h_tb, dW_out, db_out, W_out, dh_tb) -> None:
    """Check the arrays of `cross_entropy_backward`. Raises: ValueError."""
    (T, B, V), H = dlogits_tb.shape, h_tb.shape[2]
    runtime.check("dlogits_tb", dlogits_tb, np.float32, (T, B, V))
    runtime.check("h_tb", h_tb, np.float32, (T, B, H))
    runtime.check("dW_out", dW_out, np.float32, (V, H))
    runtime.check("db_out", db_out, np.float32, (V,))
    if W_out is not None:
        runtime.check("W_out", W_out, np.float32, (V, H))
        runtime.check("dh_tb", dh_tb, np.float32, (T, B, H))
