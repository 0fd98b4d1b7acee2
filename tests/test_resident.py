"""Weight-stationary products in 3xTF32: as exact as fp32, for numbers of all sizes."""

import numpy as np
import pytest

from char_gru.kernels import runtime
from char_gru.kernels.sizes import ceil_div
from char_gru.rnn.reference import rounded
from tests.helpers.compare import assert_within

ALLOWED = 4 * float(np.finfo(np.float32).eps)
"""The largest error of a product, relative to the sum of the absolute values of its terms."""

KERNEL = """
#include "resident.cuh"

extern "C" __global__ void product(float *out, XWord *x, const float *x_rows, const float *w, int K)
{
    extern __shared__ __align__(16) unsigned shared[];
    float *sums = reinterpret_cast<float *>(shared + ResidentWeights::SHARED_WORDS);
    for (int e = threadIdx.x; e < ROWS * K; e += THREADS)
        x[place_of(e / K, e % K)] = __float_as_uint(x_rows[e]);
    ResidentWeights weights;
    weights.load(shared, [=](int k, int, int column) {
        return k < K && column < COLUMNS ? w[k * COLUMNS + column] : 0.0f;
    });
    __syncthreads();
    ResidentSums all;
    weights.multiply(all, x, K);
    all.reduce_warps(sums);
    for (int e = threadIdx.x; e < ROWS * COLUMNS; e += THREADS)
        out[e] = sum_of(sums, e / COLUMNS, e % COLUMNS);
}
"""


def product(executor, x: np.ndarray, w: np.ndarray, bf16: bool, register_steps: int,
            source: str = KERNEL) -> np.ndarray:
    """x (ROWS, K) times w (K, COLUMNS)."""
    (rows, K), columns = x.shape, w.shape[1]
    k_groups = ceil_div(K, 64)
    constants = {"PRECISION": 3, "BF16": int(bf16), "ROWS": rows, "COLUMNS": columns, "K_GROUPS": k_groups,
                 "REGISTER_STEPS": register_steps}
    out, exchange = executor.empty((rows, columns), np.float32), executor.zeros((8 * k_groups, rows * 8), np.uint32)
    executor.launch(runtime.assemble("product.cu", source, constants), "product", (1, 1, 1), (256, 1, 1),
                    [out, exchange, executor.to_device(x), executor.to_device(w), np.int32(K)], 60 * 1024, False)
    return executor.to_host(out)


def operands(rows: int, K: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of all sizes and both signs, whose products with each other are of about the same size, so that each
    counts: column k of x is as large as row k of w is small."""
    rng = np.random.default_rng([rows, K, columns])
    scale = 10.0 ** rng.uniform(-8, 8, K)
    return ((rng.standard_normal((rows, K)) * scale).astype(np.float32),
            (rng.standard_normal((K, columns)) / scale[:, None]).astype(np.float32))


def relative_error(out: np.ndarray, x: np.ndarray, w: np.ndarray) -> float:
    """The largest error, relative to the sum of the products' absolute values."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    return (np.abs(out - x @ w) / (np.abs(x) @ np.abs(w))).max()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("rows, K, columns, register_steps", [
    (16, 63, 24, 1),
    *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in (
        (16, 1, 3, 0), (16, 64, 9, 0), (32, 65, 21, 1), (32, 130, 48, 3), (32, 200, 15, 2))),
])
def test_3xtf32_product_is_as_exact_as_fp32(executor, rows, K, columns, register_steps, bf16):
    x, w = operands(rows, K, columns)
    w = rounded(w, "bf16") if bf16 else w
    assert_within("product", relative_error(product(executor, x, w, bf16, register_steps), x, w), ALLOWED)


@pytest.mark.parametrize("left_out", ["x.lo[m], w_hi", "x.hi[m], w_lo"])
def test_3xtf32_product_without_a_small_product_is_less_exact(executor, left_out):
    x, w = operands(16, 64, 24)
    source, call = runtime.assemble("product.cu", KERNEL, {}), f"mma_m16n8k8_tf32(step[m], {left_out});"
    assert source.count(call) == 1
    out = product(executor, x, w, bf16=False, register_steps=0, source=source.replace(call, ";"))
    assert relative_error(out, x, w) > 100 * np.finfo(np.float32).eps


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF])
@pytest.mark.parametrize("bf16", [False, True])
def test_nan_stays_nan(executor, bits, bf16):
    x, w = operands(16, 64, 24)
    x[3, 5] = np.array(bits, np.uint32).view(np.float32)
    out = product(executor, x, w, bf16, register_steps=0)
    np.testing.assert_array_equal(np.isnan(out), np.repeat(np.isnan(x).any(1, keepdims=True), 24, axis=1))


def test_weights_are_rounded_to_bf16_and_states_are_not(executor):
    x, w = operands(32, 100, 24)
    out = product(executor, x, w, bf16=True, register_steps=0)
    np.testing.assert_array_equal(out, product(executor, x, rounded(w, "bf16"), bf16=True, register_steps=0))
    assert_within("product", relative_error(out, x, rounded(w, "bf16")), ALLOWED)
