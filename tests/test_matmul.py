"""Tiles, matrix products and column sums on the device, against the specification's product and NumPy."""

import numpy as np
import pytest

from char_gru.kernels import matmul as launchers
from char_gru.kernels import naive, runtime
from char_gru.kernels.plan import products
from char_gru.kernels.plan.gpus import GPU
from char_gru.rnn import reference
from tests import host_cuda
from tests.helpers.compare import assert_close
from tests.helpers.variants import each_variant

PRECISIONS = list(launchers.PRECISIONS)
LAYOUTS = {"nn": {}, "tn": {"transpose_a": True}, "nt": {"transpose_b": True}}

# Columns in two rounds: the second product starts while the first one's results are in shared memory.
TILE_PRODUCTS = """
#include "tile.cuh"

template <bool K_CONTIGUOUS>
__device__ void product(float *C, const float *A, const float *B, int M, int N, int K)
{
    __shared__ __align__(16) float shared[TILE_SHARED];
    for (int n0 = 0; n0 < N; n0 += TILE_N) {
        tile_product<K_CONTIGUOUS, K_CONTIGUOUS>(
            shared, K,
            [=](int m, int k) { return m < M ? A[K_CONTIGUOUS ? m * K + k : k * M + m] : 0.0f; },
            [=](int k, int n) { return n0 + n < N ? B[K_CONTIGUOUS ? (n0 + n) * K + k : k * N + n0 + n] : 0.0f; });
        for (int i = threadIdx.x; i < TILE_M * TILE_N; i += TILE_THREADS)
            if (i / TILE_N < M && n0 + i % TILE_N < N)
                C[i / TILE_N * N + n0 + i % TILE_N] = tile_c(shared, i / TILE_N, i % TILE_N);
    }
}

extern "C" __global__ void k_contiguous(float *C, const float *A, const float *B, int M, int N, int K)
{
    product<true>(C, A, B, M, N, K);
}

extern "C" __global__ void k_strided(float *C, const float *A, const float *B, int M, int N, int K)
{
    product<false>(C, A, B, M, N, K);
}
"""


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def assert_product(C: np.ndarray, A: np.ndarray, B: np.ndarray, bias, precision: str) -> None:
    """C = A B + bias, for A (M, K) and B (K, N), where the operands are rounded and nothing else."""
    exact, single = (reference.product(A.astype(dtype), B.astype(dtype), precision) + bias
                     for dtype in (np.float64, np.float32))
    assert_close("C", C, exact, single)


def bf16_bits(x: np.ndarray) -> np.ndarray:
    return (reference.rounded(x, "bf16").view(np.uint32) >> 16).astype(np.uint16)


def product(A, B, bias=None, *, transpose_a=False, transpose_b=False, operand_bytes=4, ops=launchers,
            **options) -> np.ndarray:
    """A B + bias for A (M, K) and B (K, N), on the device, C being a slice of an array that nothing else may touch."""
    M, N = len(A), B.shape[1]
    C = runtime.to_device(np.full(M * N + 2, 7.0, np.float32))
    operands = (A.T if transpose_a else A, B.T if transpose_b else B)
    if operand_bytes == 2:
        operands = map(bf16_bits, operands)
    ops.matmul(*map(runtime.to_device, operands), C[1:-1].reshape(M, N), transpose_a=transpose_a,
               transpose_b=transpose_b, bias=None if bias is None else runtime.to_device(bias), **options)
    result = runtime.to_host(C)
    assert result[0] == result[-1] == 7, "neighbours were written"
    return result[1:-1].reshape(M, N)


@pytest.mark.parametrize("TILE_M, TILE_N, TILE_K", [(16, 16, 32), (64, 48, 16), (32, 96, 16)])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_tile_product_matches_numpy(executor, precision, TILE_M, TILE_N, TILE_K):
    source = runtime.assemble("tile_products.cu", TILE_PRODUCTS, {
        "PRECISION": launchers.PRECISIONS[precision], "TILE_M": TILE_M, "TILE_N": TILE_N, "TILE_K": TILE_K})
    M, N = TILE_M - 1, TILE_N + 5
    for K in (0, 1, TILE_K - 1, TILE_K, TILE_K + 1, 3 * TILE_K + 7):
        A, B = random(M, K), random(K, N)
        for kernel, operands in (("k_contiguous", (A, B.T)), ("k_strided", (A.T, B))):
            C = executor.empty((M, N), np.float32)
            executor.launch(source, kernel, (1, 1, 1), (launchers.TILE_THREADS, 1, 1),
                            [C, *map(executor.to_device, operands), *map(np.int32, (M, N, K))], 0, False)
            assert_product(executor.to_host(C), A, B, 0, precision)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ops, precision, operand_bytes", [
    *((launchers, *operands) for operands in launchers.OPERANDS), (naive, "fp32", 4)])
def test_matmul_matches_numpy(executor, ops, precision, operand_bytes, layout):
    for M, N, K in ((1, 2, 3), (2, 65, 1), (63, 130, 17), (64, 64, 32), (65, 1, 5), (66, 31, 33)):
        A, B = random(M, K), random(K, N)
        C = product(A, B, precision=precision, operand_bytes=operand_bytes, ops=ops, **LAYOUTS[layout])
        assert_product(C, A, B, 0, precision)


# M, N, K. M and N below, at and above a tile, as near as rows of 16 bytes allow; K less than a round, whole rounds, and
# more than all stages.
MULTISTAGE_SIZES = {"nn": ((191, 120, 24), (192, 128, 96), (193, 136, 40), (1, 8, 8)),
                    "tn": ((184, 120, 31), (192, 128, 64), (200, 136, 133), (8, 8, 1)),
                    "nt": ((191, 127, 24), (192, 128, 96), (193, 129, 40), (1, 1, 8))}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision, operand_bytes", launchers.OPERANDS)
def test_multistage_matmul_matches_numpy(executor, precision, operand_bytes, layout):
    for M, N, K in MULTISTAGE_SIZES[layout]:
        A, B, bias = random(M, K), random(K, N), random(N)
        C = product(A, B, bias, precision=precision, operand_bytes=operand_bytes, variant="multistage",
                    **LAYOUTS[layout])
        assert_product(C, A, B, bias, precision)


@pytest.mark.parametrize("precision, operand_bytes", launchers.OPERANDS[1:])
def test_multistage_matmul_in_large_tiles_matches_numpy(executor, precision, operand_bytes):
    A, B = random(264, 35), random(35, 136)
    C = product(A, B, transpose_a=True, precision=precision, operand_bytes=operand_bytes, variant="multistage",
                tile=256)
    assert_product(C, A, B, 0, precision)


def test_multistage_matmul_split_along_k_matches_numpy(executor):
    assert products._balanced(200, 136, 601, 16, executor.gpu.multiprocessors, (192,)).splits == 2
    A, B, bias = random(200, 601), random(601, 136), random(136)
    C = product(A, B, bias, transpose_a=True, precision="tf32", variant="multistage", tile=192)
    assert_product(C, A, B, bias, "tf32")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_matmul_in_large_tiles_matches_numpy(executor, precision):
    A, B, bias = random(129, 35), random(35, 127), random(127)
    C = product(A, B, bias, precision=precision, tile=128)
    assert_product(C, A, B, bias, precision)


@pytest.mark.parametrize("K", [2 * products.SPLIT_K_FROM, 3 * products.SPLIT_K_FROM + 1])
@pytest.mark.parametrize("with_bias", [False, True])
def test_matmul_split_along_k_matches_numpy(executor, K, with_bias):
    A, B, bias = random(5, K), random(K, 67), random(67) if with_bias else None
    assert_product(product(A, B, bias), A, B, bias if with_bias else 0, "fp32")


@pytest.mark.parametrize("M, N, K", [
    (3072, 1024, 6400), (66, 1024, 6400), (66, 256, 3072), (3072, 256, 66), (1, 1, 10**6), (1, 20_000, 3072),
    (8200, 1, 600)])
@pytest.mark.parametrize("tile", products.TILES)
def test_splits_cover_k_and_fit_in_the_scratch_array(M, N, K, tile):
    splits, K_split = products._tiled_splits(M, N, K, tile)
    assert (splits - 1) * K_split < K <= splits * K_split
    assert splits == 1 or splits * M * N <= products.SPLIT_BLOCKS * products.TILES[0]**2


def plan(M, N, K, *, multiprocessors=132, capability=90, shared_bytes=99 * 1024, aligned=True) -> products.ProductPlan:
    """How a GPU would compute a product in tf32."""
    return products.product_plan(GPU("", capability, multiprocessors, shared_bytes), M, N, K, "tf32", 4, aligned)


@pytest.mark.parametrize("multiprocessors, tile", [(132, 192), (128, 192), (108, 256)],
                         ids=["H100", "RTX 4090", "A100"])
def test_gradient_of_recurrent_weights_is_one_wave_of_multistage_tiles(multiprocessors, tile):
    assert plan(3072, 1024, 6400, multiprocessors=multiprocessors) == ("multistage", tile, 128, 1, 6400)


@pytest.mark.parametrize("M, N, K", [(1536, 512, 6400), (2048, 1024, 6400), (20_000, 1024, 6400), (6400, 3072, 1024),
                                     (1000, 1000, 10**6), (3072, 1024, 1), (4096, 128, 0)])
@pytest.mark.parametrize("multiprocessors", [1, 82, 108, 132, 170])
def test_multistage_splits_cover_k_and_keep_all_multiprocessors_busy(M, N, K, multiprocessors):
    variant, tile, columns, splits, K_split = plan(M, N, K, multiprocessors=multiprocessors)
    assert variant == "multistage" and tile in products.MULTISTAGE_TILES["tf32"]
    assert splits == 1 and K_split >= K or (splits - 1) * K_split < K <= splits * K_split
    assert splits == 1 or K_split % 16 == 0 and splits * M * N <= products.MAX_PARTIAL_SUMS
    tiles = products._tiles(M, N, tile, columns)
    waves = -(-tiles * splits // multiprocessors)
    if K >= 6400:
        assert M * N * K >= 0.6 * waves * multiprocessors * tile * columns * K_split


@pytest.mark.parametrize("why_not", [{"capability": 75}, {"shared_bytes": 64 * 1024}, {"aligned": False}])
def test_product_is_tiled_where_the_multistage_variant_cannot_run(why_not):
    assert plan(3072, 1024, 6400, **why_not).variant == "tiled"


@pytest.mark.parametrize("M, N, K", [(66, 1024, 6400), (66, 256, 3072), (3072, 66, 6400)])
def test_small_product_is_tiled(M, N, K):
    assert plan(M, N, K).variant == "tiled"


@each_variant(launchers)
@pytest.mark.parametrize("M, N", [(1, 1), (2, 31), (31, 32), (32, 33), (33, 65), (300, 3)])
def test_column_sums_match_numpy(executor, ops, M, N):
    A, sums = random(M, N), runtime.to_device(np.full(N + 2, 7.0, np.float32))
    ops.column_sums(runtime.to_device(A), sums[1:-1])
    result = runtime.to_host(sums)
    assert result[0] == result[-1] == 7, "neighbours were written"
    assert_close("sums", result[1:-1], A.sum(axis=0, dtype=float), A.sum(axis=0))


def all_kernels(precision: str) -> list[np.ndarray]:
    """Whole and split products, and column sums, with tails everywhere."""
    A, B = random(65, 19), random(19, 66)
    sums = runtime.empty((66,), np.float32)
    launchers.column_sums(runtime.to_device(random(40, 66)), sums)
    return [product(A, B, random(66), precision=precision), product(A, B, precision=precision, transpose_b=True),
            product(A, B, precision=precision, transpose_a=True),
            product(random(3, 523), random(523, 5), random(5), precision=precision), runtime.to_host(sums),
            *(product(random(8, 72), random(72, 136), precision=name, operand_bytes=size, variant="multistage",
                      **layout)
              for name, size in launchers.OPERANDS if name == precision for layout in LAYOUTS.values())]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_matmul_does_not_depend_on_the_order_of_threads(ordered_executor, precision):
    results = all_kernels(precision)
    with runtime.use(ordered_executor.ascending()):
        for result, ascending in zip(results, all_kernels(precision), strict=True):
            np.testing.assert_array_equal(result, ascending)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("sanitizer", ["address,undefined", pytest.param("thread", marks=pytest.mark.slow)])
def test_sanitizer_finds_nothing_in_matmul(monkeypatch, sanitizer, precision):
    monkeypatch.setattr(launchers, "SUM_THREADS", 64)  # a sanitizer is slow to start a thread

    def whole_and_split():
        product(random(5, 19), random(19, 65), random(65), precision=precision)
        product(random(3, 523), random(523, 5), random(5), precision=precision)

    def sums():
        launchers.column_sums(runtime.to_device(random(5, 33)), runtime.empty((33,), np.float32))

    assert host_cuda.run_sanitized(whole_and_split, sanitizer) == ""
    assert host_cuda.run_sanitized(sums, sanitizer) == ""


@pytest.mark.slow
@pytest.mark.parametrize("precision, operand_bytes", [("fp32", 4), ("tf32", 4), ("bf16", 2)])
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizer_finds_nothing_in_multistage_matmul(sanitizer, precision, operand_bytes):
    def multistage():
        for layout in LAYOUTS.values():
            product(random(8, 136), random(136, 8), precision=precision, operand_bytes=operand_bytes,
                    variant="multistage", **layout)

    assert host_cuda.run_sanitized(multistage, sanitizer) == ""


@each_variant(launchers)
@pytest.mark.parametrize("name", ["A", "B", "C", "bias"])
def test_matmul_names_the_argument_that_does_not_fit(executor, ops, name):
    arrays = {key: runtime.zeros(shape, np.float64 if key == name else np.float32) for key, shape in
              {"A": (3, 4), "B": (4, 6), "C": (3, 6), "bias": (6,)}.items()}
    with pytest.raises(ValueError, match=f"^{name}: expected .* float32"):
        ops.matmul(**arrays)


def test_matmul_refuses_an_unknown_precision_and_two_transposed_operands(executor):
    A = runtime.zeros((3, 3), np.float32)
    with pytest.raises(ValueError, match="^precision: expected one of fp32, tf32, bf16, got 'fp16'"):
        launchers.matmul(A, A, A, precision="fp16")
    with pytest.raises(ValueError, match="^transpose_a, transpose_b: expected at most one"):
        launchers.matmul(A, A, A, transpose_a=True, transpose_b=True)


def test_matmul_refuses_an_unknown_variant_and_rows_that_multistage_copies_cannot_take(executor):
    A = runtime.zeros((6, 6), np.float32)
    with pytest.raises(ValueError, match="^variant: expected one of tiled, multistage, got 'fast'"):
        launchers.matmul(A, A, A, variant="fast")
    with pytest.raises(ValueError, match="^A, B: expected rows at multiples of 16 bytes .* M, N, K = 6, 6, 6"):
        launchers.matmul(A, A, A, variant="multistage")
    B = runtime.zeros((65,), np.float32)[1:].reshape(8, 8)
    with pytest.raises(ValueError, match="^A, B: expected rows at multiples of 16 bytes"):
        launchers.matmul(B, B, runtime.zeros((8, 8), np.float32), variant="multistage")
    with pytest.raises(ValueError, match="^A: expected .* float32"):
        launchers.matmul(runtime.zeros((6, 6), np.uint16), A, A, precision="tf32")
