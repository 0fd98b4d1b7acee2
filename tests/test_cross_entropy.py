"""Output layer and loss on the device against the specification."""

import numpy as np
import pytest

from char_gru.kernels import cross_entropy as launchers
from char_gru.kernels import runtime
from char_gru.kernels.plan.gpus import GPUS
from char_gru.kernels.plan.products import (
    NARROW_OUTPUTS,
    OUTPUT_K,
    OUTPUT_TILES,
    TILED_OUTPUT,
    WIDE_OUTPUTS,
    output_tile,
)
from char_gru.rnn import reference
from tests import host_cuda
from tests.helpers.compare import assert_close
from tests.helpers.variants import each_sanitizer, each_variant, each_variant_and_precision

TILE_N, WIDE, TILE_K, STAGES = TILED_OUTPUT.columns, WIDE_OUTPUTS[0].columns, OUTPUT_K, NARROW_OUTPUTS[0].stages
MULTISTAGE = [(precision, tile) for precision, tiles in OUTPUT_TILES.items() for tile in tiles if tile.stages]
SIZES = [  # T, B, H, V: one below, at and above each tile; V of one sweep and of several
    (1, 1, 1, 2), (3, 2, 5, 7), (3, 21, TILE_K, 66), (4, 16, TILE_K - 1, TILE_N - 1),
    (5, 13, TILE_K + 1, TILE_N), (2, 3, 2 * TILE_K + 1, TILE_N + 1), (11, 7, 34, 257), (1, 3, 4, 20_011)]
ALIGNED = [  # with rows of whole 16 bytes: fewer stages than there are, all of them, and one used again
    (1, 1, 4, 2), (3, 21, TILE_K, 66), (1, 64, STAGES * TILE_K, TILE_N), (5, 13, STAGES * TILE_K + 36, TILE_N + 1),
    (2, 5, 3 * TILE_K, WIDE - 1), (3, 11, 36, WIDE), (9, 15, TILE_K, WIDE + 1)]


def layer(T: int, B: int, H: int, V: int, scale: float = 1.0) -> tuple[np.ndarray, ...]:
    """Float32 h_tb, W_out, b_out, and targets_tb; logits of about this scale. With logits so large that one character
    of a position has nearly all of the probability, few elements would decide how large the specification's error is,
    which differs with the processor's BLAS."""
    rng = np.random.default_rng(V)
    h_tb, W_out, b_out = (rng.standard_normal(shape).astype(np.float32) for shape in ((T, B, H), (V, H), (V,)))
    return h_tb, np.float32(scale / np.sqrt(H)) * W_out, b_out, rng.integers(0, V, (T, B)).astype(np.int32)


def device_forward(h_tb, W_out, b_out, targets_tb, precision="fp32", ops=launchers,
                   **options) -> tuple[np.ndarray, np.ndarray]:
    """loss and dlogits_tb, the latter a slice of a larger array of which nothing else may be written."""
    T, B, V = *targets_tb.shape, len(W_out)
    loss, dlogits_tb = runtime.empty((1,), np.float32), runtime.to_device(np.full((T + 1, B, V), 7, np.float32))
    ops.cross_entropy_forward(*map(runtime.to_device, (h_tb, W_out, b_out, targets_tb)), loss, dlogits_tb[:T],
                              precision=precision, **options)
    dlogits_tb = runtime.to_host(dlogits_tb)
    assert (dlogits_tb[T] == 7).all()
    return runtime.to_host(loss), dlogits_tb[:T]


def reference_forward(h_tb, W_out, b_out, targets_tb, dtype, precision) -> tuple[np.ndarray, np.ndarray]:
    loss, dlogits_tb = reference.cross_entropy_forward(*(x.astype(dtype) for x in (h_tb, W_out, b_out)), targets_tb,
                                                       precision)
    return np.array([loss]), dlogits_tb


def assert_forward_matches_reference(h_tb, W_out, b_out, targets_tb, precision="fp32", ops=launchers,
                                     **options) -> None:
    arguments = h_tb, W_out, b_out, targets_tb
    actual = device_forward(*arguments, precision, ops, **options)
    exact, plain = (reference_forward(*arguments, dtype, precision) for dtype in (np.float64, np.float32))
    for name, *results in zip(("loss", "dlogits_tb"), actual, exact, plain):
        assert_close(name, *results)


@each_variant_and_precision(launchers)
@pytest.mark.parametrize("T, B, H, V", SIZES)
def test_cross_entropy_forward_matches_reference(executor, T, B, H, V, ops, precision):
    assert_forward_matches_reference(*layer(T, B, H, V), precision, ops)


@pytest.mark.capability(80)
@pytest.mark.parametrize("precision, tile", MULTISTAGE)
@pytest.mark.parametrize("T, B, H, V", ALIGNED)
def test_multistage_product_matches_reference(executor, T, B, H, V, tile, precision):
    assert_forward_matches_reference(*layer(T, B, H, V), precision, variant="multistage", tile=tile)


@pytest.mark.capability(80)
@pytest.mark.parametrize("T, B, H, V", ALIGNED)
def test_products_and_tiles_give_the_same_bits_in_fp32(executor, T, B, H, V):
    """All of them add in ascending order of k."""
    results = [device_forward(*layer(T, B, H, V), variant="multistage" if tile.stages else "tiled", tile=tile)
               for tile in OUTPUT_TILES["fp32"]]
    for loss, dlogits_tb in results[1:]:
        assert loss == results[0][0] and (dlogits_tb == results[0][1]).all()


@pytest.mark.capability(80)
@pytest.mark.parametrize("H, skipped, stages", [(8, 0, STAGES), (9, 0, 0), (8, 1, 0), (8, 4, STAGES)])
def test_rows_that_no_copy_of_16_bytes_fits_pass_through_registers(executor, monkeypatch, H, skipped, stages):
    """skipped: elements of the array before h_tb."""
    launch, found = runtime.launch, []

    def noted(*args, constants, **options):
        found.append(constants["STAGES"])
        launch(*args, constants=constants, **options)

    monkeypatch.setattr(runtime, "launch", noted)
    h_tb, *others = layer(1, 2, H, 7)
    memory = runtime.to_device(np.concatenate([np.zeros(skipped, np.float32), h_tb.ravel()]))
    launchers.cross_entropy_forward(memory[skipped:].reshape(h_tb.shape), *map(runtime.to_device, others),
                                    runtime.empty((1,), np.float32), runtime.empty((1, 2, 7), np.float32))
    assert found == [stages, stages]


@pytest.mark.parametrize("positions, multiprocessors, rows", [
    (6400, 132, 64), (6400, 108, 64), (3200, 132, 32), (6400, 142, 64), (1, 132, 32), (4200, 132, 32), (6400, 58, 64)])
def test_blocks_have_the_rows_that_keep_multiprocessors_equally_busy(positions, multiprocessors, rows):
    gpu = GPUS["h100"]._replace(multiprocessors=multiprocessors)
    assert output_tile(gpu, positions, TILE_N, "bf16").rows == rows


@pytest.mark.parametrize("gpu, stages", [("h100", 4), ("a100", 4), ("4090", 2), ("5090", 2), ("3060", 2)])
def test_bytes_take_one_sweep_with_the_stages_that_fit(gpu, stages):
    tile = output_tile(GPUS[gpu], 6400, 256, "tf32")
    assert (tile.columns, tile.stages) == (256, stages) and tile.shared_bytes <= GPUS[gpu].shared_bytes
    assert [output_tile(GPUS[gpu], 6400, V, "bf16") == tile for V in (80, 160, 161, 257, 320, 321)] == [
        False, False, True, False, False, True]
    assert output_tile(GPUS[gpu], 6400, 256, "fp32").columns == 80


@each_variant(launchers)
@pytest.mark.parametrize("V", [66, 257])
def test_huge_logits_do_not_overflow(executor, ops, V):
    arguments = layer(5, 13, 17, V, scale=1e4)
    assert np.abs(arguments[0] @ arguments[1].T).max() > 1e4
    assert_forward_matches_reference(*arguments, ops=ops)


@each_variant(launchers)
@pytest.mark.parametrize("V", [66, 257])
@pytest.mark.parametrize("lead", [5.0, 20.0, 200.0])
def test_certain_targets_match_reference(executor, ops, V, lead):
    """The target's logit leads by so much that its probability is nearly or exactly 1 in float32."""
    targets_tb = np.array([[V - 1, 0, 1], [V // 2, V - 2, 2]], np.int32)
    W_out = np.eye(V, dtype=np.float32)
    assert_forward_matches_reference(lead * W_out[targets_tb], W_out, np.zeros(V, np.float32), targets_tb, ops=ops)


@each_variant(launchers)
@pytest.mark.parametrize("rising", [False, True])
def test_maximum_may_stand_in_any_tile(executor, ops, rising):
    """Logits 0.5 apart: from tile to tile the sum is either rescaled to almost nothing or hardly added to."""
    _, W_out, b_out, targets_tb = layer(1, 2, 3, 3 * TILE_N + 5)
    b_out[...] = 0.5 * np.arange(len(b_out))[::1 if rising else -1]
    assert_forward_matches_reference(np.zeros((1, 2, 3), np.float32), W_out, b_out, targets_tb, ops=ops)


@each_variant(launchers)
@pytest.mark.parametrize("V", [66, 257])
def test_logit_that_is_not_finite_shows_in_loss_and_gradient(executor, ops, V):
    arguments = layer(2, 3, 5, V)
    arguments[1][V - 1, 2] = np.nan
    loss, dlogits_tb = device_forward(*arguments, ops=ops)
    assert np.isnan(loss).all() and np.isnan(dlogits_tb).all()


@each_variant(launchers)
@pytest.mark.parametrize("T, B, H, V", [(5, 13, 17, 66), (3, 7, 5, 257), (5, 13, 68, 66), (3, 7, 36, 257)])
def test_cross_entropy_forward_does_not_depend_on_the_order_of_threads(ordered_executor, ops, T, B, H, V):
    arguments = layer(T, B, H, V)
    results = device_forward(*arguments, ops=ops)
    with runtime.use(ordered_executor.ascending()):
        expected = device_forward(*arguments, ops=ops)
    assert all((a == b).all() for a, b in zip(results, expected))


@each_variant(launchers)
@each_sanitizer
@pytest.mark.parametrize("H", [5, 8])  # through registers; multistage
def test_sanitizer_finds_nothing_in_cross_entropy_forward(ops, sanitizer, H):
    assert host_cuda.run_sanitized(lambda: device_forward(*layer(1, 3, H, TILE_N + 3), ops=ops), sanitizer) == ""


@each_variant_and_precision(launchers)
@pytest.mark.parametrize("T, B, H, V", [(1, 1, 1, 2), (3, 2, 5, 7), (5, 13, 17, 66)])
def test_cross_entropy_backward_matches_reference(executor, T, B, H, V, ops, precision):
    h_tb, W_out, *_ = layer(T, B, H, V)
    dlogits_tb = np.random.default_rng(9).standard_normal((T, B, V)).astype(np.float32)
    shapes = {"dW_out": (V, H), "db_out": (V,), "dh_tb": (T, B, H)}
    actual = [runtime.empty(shape, np.float32) for shape in shapes.values()]
    dW_out, db_out, dh_tb = actual
    ops.cross_entropy_backward(*map(runtime.to_device, (dlogits_tb, h_tb)), dW_out, db_out, runtime.to_device(W_out),
                               dh_tb, precision=precision)
    exact, plain = (reference.cross_entropy_backward(*(array.astype(dtype) for array in (dlogits_tb, h_tb, W_out)),
                                                     precision) for dtype in (np.float64, np.float32))
    for name, result, *expected in zip(shapes, actual, exact, plain):
        assert_close(name, runtime.to_host(result), *expected)


@each_variant(launchers)
def test_cross_entropy_names_the_argument_that_does_not_fit(executor, ops):
    h_tb, W_out, b_out, targets_tb = map(runtime.to_device, layer(2, 3, 5, 7))
    loss, dlogits_tb = runtime.zeros((1,), np.float32), runtime.zeros((2, 3, 7), np.float32)
    with pytest.raises(ValueError, match="^targets_tb: expected .* int32"):
        ops.cross_entropy_forward(h_tb, W_out, b_out, runtime.zeros((2, 3), np.int64), loss, dlogits_tb)
    with pytest.raises(ValueError, match="^dlogits_tb: expected .* strided"):
        ops.cross_entropy_forward(h_tb, W_out, b_out, targets_tb, loss,
                                  runtime.zeros((2, 7, 3), np.float32).transpose(0, 2, 1))
    with pytest.raises(ValueError, match="^precision: expected (one of fp32, tf32, bf16|fp32, the only one)"):
        ops.cross_entropy_forward(h_tb, W_out, b_out, targets_tb, loss, dlogits_tb, precision="fp16")
    with pytest.raises(ValueError, match="^dW_out: expected"):
        ops.cross_entropy_backward(dlogits_tb, h_tb, b_out, b_out)
    with pytest.raises(ValueError, match="^dh_tb: expected"):
        ops.cross_entropy_backward(dlogits_tb, h_tb, W_out, b_out, W_out, dlogits_tb)
    with pytest.raises(ValueError, match="^variant: expected one of tiled, multistage, got 'fast'"):
        launchers.cross_entropy_forward(h_tb, W_out, b_out, targets_tb, loss, dlogits_tb, variant="fast")
