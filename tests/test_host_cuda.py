"""The harness that runs kernels without a GPU finds the faults that are planted here, and is silent on right
kernels."""

import time

import numpy as np
import pytest

from char_gru.kernels import runtime
from tests.host_cuda import ORDERS, BuildError, Deadlock, HostExecutor, compiler, run_sanitized, unwritten

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")


def run(text, kernel, grid, block, args, *, shared_bytes=0, cooperative=False, executor=None):
    """One launch of a kernel given as text, which may include the package's headers."""
    executor = executor or HostExecutor()
    executor.launch(runtime.assemble(f"{kernel}.cu", text, {}), kernel, (grid, 1, 1), (block, 1, 1), args, shared_bytes,
                    cooperative)
    return executor


def results_by_order(text, kernel, grid, block, make_args, **options):
    """The first argument after the launch, for each order of the threads."""
    results = []
    for order in ORDERS:
        args = make_args()
        run(text, kernel, grid, block, args, executor=HostExecutor(order, seed=3), **options)
        results.append(args[0])
    return results


def report_of(text, kernel, grid, block, args, sanitize, **options):
    """The report of a sanitizer about one launch, "" where it finds nothing."""
    def launch():
        run(text, kernel, grid, block, args, executor=runtime.current_executor(), **options)

    return run_sanitized(launch, sanitize)


# ---- Barriers inside a block -----------------------------------------------------------------------------------------

REVERSE = """
extern "C" __global__ void reverse(float *out, const float *in)
{
    __shared__ float tile[64];
    tile[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = tile[63 - threadIdx.x];
}
"""
REVERSE_UNSYNCHRONISED = REVERSE.replace("    __syncthreads();\n", "")


def reverse_args():
    return [HostExecutor().empty(64, np.float32), np.arange(64, dtype=np.float32)]


def test_right_kernel_gives_equal_results_in_every_order():
    for result in results_by_order(REVERSE, "reverse", 1, 64, reverse_args):
        np.testing.assert_array_equal(result, np.arange(64, dtype=np.float32)[::-1])


def test_missing_syncthreads_changes_the_result_with_the_order():
    ascending, descending, random = results_by_order(REVERSE_UNSYNCHRONISED, "reverse", 1, 64, reverse_args)
    assert not np.array_equal(ascending, descending, equal_nan=True)
    assert not np.array_equal(ascending, random, equal_nan=True)


def test_thread_sanitizer_names_the_line_of_a_missing_syncthreads():
    report = report_of(REVERSE_UNSYNCHRONISED, "reverse", 1, 64, reverse_args(), "thread")
    assert "data race" in report and "kernels/reverse.cu:6" in report
    assert report_of(REVERSE, "reverse", 1, 64, reverse_args(), "thread") == ""


@pytest.mark.slow
def test_thread_sanitizer_finds_a_missing_syncwarp():
    right = """
    extern "C" __global__ void shift(float *out)
    {
        __shared__ float tile[32];
        tile[threadIdx.x] = threadIdx.x;
        __syncwarp();
        const float next = tile[(threadIdx.x + 1) % 32];
        out[threadIdx.x] = __shfl_xor_sync(0xffffffff, next, 1);
    }
    """
    wrong = right.replace("__syncwarp();", "")
    shuffled = wrong.replace("const float next", "__shfl_sync(0xffffffff, 1, 0); const float next")  # orders no memory
    out = HostExecutor().empty(32, np.float32)
    assert report_of(right, "shift", 1, 32, [out], "thread") == ""
    np.testing.assert_array_equal(out, (np.arange(32) ^ 1) + 1 - 32 * (np.arange(32) == 30))
    assert "data race" in report_of(wrong, "shift", 1, 32, [out], "thread")
    assert "data race" in report_of(shuffled, "shift", 1, 32, [out], "thread")


# ---- Barriers between blocks -----------------------------------------------------------------------------------------

RING = """
#include "barrier.cuh"
extern "C" __global__ void ring(float *out, float *cell, unsigned *counter, int steps)
{
    const int next = (blockIdx.x + 1) % gridDim.x;
    Group group(counter, 0, blockIdx.x, gridDim.x);
    float sum = 0.0f;
    for (int step = 0; step < steps; ++step) {
        if (threadIdx.x == 0)
            cell[step % 2 * gridDim.x + blockIdx.x] = blockIdx.x + step;
        group.barrier();
        sum += cell[step % 2 * gridDim.x + next];
    }
    group.leave();
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}
"""
RING_UNSYNCHRONISED = RING.replace("group.barrier();", "__syncthreads();")


def ring_args(steps=20):
    executor = HostExecutor()
    return [executor.empty(4 * 8, np.float32), executor.empty(2 * 4, np.float32), executor.zeros(2, np.uint32),
            np.int32(steps)]


def test_group_barrier_works_over_many_steps_and_is_counted():
    expected = np.repeat([20 * ((block + 1) % 4) + sum(range(20)) for block in range(4)], 8).astype(np.float32)
    for result in results_by_order(RING, "ring", 4, 8, ring_args, cooperative=True):
        np.testing.assert_array_equal(result, expected)
    executor = run(RING, "ring", 4, 8, ring_args(), cooperative=True)
    (launch,) = executor.launches
    assert (launch.kernel, launch.grid, launch.group_barriers) == ("ring", (4, 1, 1), 4 * 20)


def test_the_last_block_to_leave_sets_the_counters_back():
    args = ring_args()
    first, again = (run(RING, "ring", 4, 8, args, cooperative=True) and args[0].copy() for _ in range(2))
    np.testing.assert_array_equal(args[2], [0, 0])
    np.testing.assert_array_equal(first, again)


def test_thread_sanitizer_finds_a_missing_group_barrier():
    assert report_of(RING, "ring", 4, 8, ring_args(5), "thread", cooperative=True) == ""
    report = report_of(RING_UNSYNCHRONISED, "ring", 4, 8, ring_args(5), "thread", cooperative=True)
    assert "data race" in report and "kernels/ring.cu" in report


@pytest.mark.slow
def test_thread_sanitizer_finds_blocks_that_write_the_same_place():
    right = 'extern "C" __global__ void fill(float *out) { out[blockIdx.x * blockDim.x + threadIdx.x] = blockIdx.x; }'
    wrong = right.replace("blockIdx.x * blockDim.x + threadIdx.x", "threadIdx.x")
    assert report_of(right, "fill", 8, 4, [np.zeros(32, np.float32)], "thread") == ""
    assert "data race" in report_of(wrong, "fill", 8, 4, [np.zeros(32, np.float32)], "thread")


def test_waiting_for_a_block_in_an_ordinary_launch_is_an_error():
    with pytest.raises(Deadlock, match="not cooperative"):
        run(RING, "ring", 4, 8, ring_args())


# ---- Memory ----------------------------------------------------------------------------------------------------------

def test_address_sanitizer_finds_an_index_one_past_the_end():
    text = 'extern "C" __global__ void copy(float *out, const float *in) {{ out[threadIdx.x] = in[threadIdx.x + {}]; }}'
    arrays = [np.zeros(31, np.float32), np.zeros(31, np.float32)]
    assert report_of(text.format(0), "copy", 1, 31, arrays, "address,undefined") == ""
    report = report_of(text.format(1), "copy", 1, 31, arrays, "address,undefined")
    assert "kernels/copy.cu:1" in report and "heap-buffer-overflow" in report


def test_address_sanitizer_finds_an_index_past_the_end_of_shared_memory():
    static = """extern "C" __global__ void keep(float *out) {
        __shared__ float tile[8];
        tile[threadIdx.x] = 1.0f;
        out[threadIdx.x] = tile[threadIdx.x];
    }"""
    dynamic = static.replace("__shared__ float tile[8];", "extern __shared__ __align__(16) float tile[];")
    for text, shared_bytes in ((static, 0), (dynamic, 32)):
        eight, nine = (report_of(text, "keep", 1, threads, [np.zeros(9, np.float32)], "address,undefined",
                                 shared_bytes=shared_bytes) for threads in (8, 9))
        assert eight == "" and "kernels/keep.cu:3" in nine


def test_undefined_behaviour_sanitizer_finds_a_misaligned_vector_load():
    text = """extern "C" __global__ void load(float *out, const float *in) {
        out[0] = reinterpret_cast<const float4 *>(in + 1)->x;
    }"""
    report = report_of(text, "load", 1, 1, [np.zeros(1, np.float32), np.zeros(8, np.float32)], "address,undefined")
    assert "misaligned address" in report and "kernels/load.cu:2" in report


def test_sanitized_launch_reads_and_writes_slices_of_one_buffer():
    text = """extern "C" __global__ void add(float *out, float *left, const float *right) {
        left[threadIdx.x] += 1.0f;
        __syncthreads();
        out[threadIdx.x] = left[threadIdx.x] + right[threadIdx.x];
    }"""
    flat = HostExecutor().to_device(np.arange(13, dtype=np.float32))
    assert report_of(text, "add", 1, 5, [flat[:5], flat[6:11], flat[8:13]], "address,undefined") == ""
    np.testing.assert_array_equal(flat[:5] - flat[6:11], flat[8:13])
    np.testing.assert_array_equal(flat[5:], [5, 7, 8, 9, 10, 11, 11, 12])


def test_unwritten_output_is_found_by_its_poison():
    text = 'extern "C" __global__ void fill(float *out) { if (threadIdx.x != 5) out[threadIdx.x] = 1.0f; }'
    out = HostExecutor().empty((4, 8), np.float32)
    assert unwritten(out) == 32 and np.isnan(out).all()
    run(text, "fill", 1, 32, [out])
    assert unwritten(out) == 1 and np.isnan(out[0, 5])


def test_shared_memory_is_poisoned_for_every_block():
    text = """extern "C" __global__ void read(unsigned *out) {
        __shared__ unsigned fixed[32];
        extern __shared__ unsigned sized[];
        out[blockIdx.x * 64 + threadIdx.x] = fixed[threadIdx.x];
        out[blockIdx.x * 64 + 32 + threadIdx.x] = sized[threadIdx.x];
        fixed[threadIdx.x] = sized[threadIdx.x] = 0;
    }"""
    out = np.zeros(64 * 20, np.uint32)
    run(text, "read", 20, 32, [out], shared_bytes=128)
    assert unwritten(out) == out.size


def test_reading_an_asynchronous_copy_without_waiting_finds_the_old_bytes():
    right = """
    #include "ptx.cuh"
    extern "C" __global__ void stage(float *out, const float *in, int size)
    {
        __shared__ __align__(16) float tile[2][32];
        cp_async_16(&tile[0][4 * threadIdx.x], in + 4 * threadIdx.x, 4 * int(threadIdx.x) < size);
        cp_async_commit();
        for (int i = 0; i < 4; ++i)
            cp_async_4(&tile[1][8 * i + threadIdx.x], in + 8 * i + threadIdx.x);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        for (int i = 0; i < 4; ++i)
            out[8 * i + threadIdx.x] = tile[0][8 * i + threadIdx.x];
        cp_async_wait<0>();
        __syncthreads();
        for (int i = 0; i < 4; ++i)
            out[32 + 8 * i + threadIdx.x] = tile[1][8 * i + threadIdx.x];
    }
    """
    values = HostExecutor().to_device(np.arange(32, dtype=np.float32))
    out = HostExecutor().empty(64, np.float32)
    run(right, "stage", 1, 8, [out, values, np.int32(24)])
    np.testing.assert_array_equal(out, np.concatenate([np.where(np.arange(32) < 24, values, 0), values]))
    assert report_of(right, "stage", 1, 8, [out, values, np.int32(24)], "thread") == ""
    run(right.replace("cp_async_wait<0>();", "cp_async_wait<1>();"), "stage", 1, 8, [out, values, np.int32(24)])
    assert unwritten(out) == 32


# ---- Bytes -----------------------------------------------------------------------------------------------------------

def bytes_of(text, kernel, grid, block, args, **options):
    """Bytes that one launch read and wrote, per argument."""
    executor = HostExecutor(count_bytes=True)
    (launch,) = run(text, kernel, grid, block, args, executor=executor, **options).launches
    return launch.bytes_read, launch.bytes_written


COPY = """
extern "C" __global__ void copy(float *out, const float *in, int n)
{
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n)
        out[i] = in[i];
}
"""


def test_copy_reads_and_writes_each_byte_once():
    values, out = np.arange(1000, dtype=np.float32), np.zeros(1024, np.float32)
    assert bytes_of(COPY, "copy", 16, 64, [out, values, np.int32(1000)]) == ((0, 4000, 0), (4000, 0, 0))
    np.testing.assert_array_equal(out[:1000], values)


def test_without_the_switch_nothing_is_counted():
    (launch,) = run(COPY, "copy", 1, 64, [np.zeros(64, np.float32), np.zeros(64, np.float32), np.int32(64)]).launches
    assert (launch.bytes_read, launch.bytes_written) == ((), ())


def test_an_array_that_overlaps_others_counts_for_the_first():
    flat = np.zeros(96, np.float32)
    args = [flat[:64], flat[32:], np.int32(64)]
    assert bytes_of(COPY, "copy", 1, 64, args) == ((32 * 4, 32 * 4, 0), (64 * 4, 0, 0))


def test_accesses_count_with_the_width_and_as_often_as_the_source_says():
    text = """
    __device__ float4 twice(float4 v) { return make_float4(2 * v.x, 2 * v.y, 2 * v.z, 2 * v.w); }
    extern "C" __global__ void widths(float4 *quads, float2 *pairs, unsigned short *halves, unsigned char *bytes,
                                      double *doubles, const float4 *__restrict__ in, int *sums)
    {
        const float4 v = __ldg(in + threadIdx.x);
        quads[threadIdx.x] = twice(in[threadIdx.x]);
        pairs[threadIdx.x] = make_float2(v.x, 0.0f);
        halves[threadIdx.x] = 1;
        bytes[threadIdx.x] = 1;
        doubles[threadIdx.x] = in->x;
        sums[threadIdx.x] += 1;
    }"""
    args = [np.zeros((32, 4), np.float32), np.zeros((32, 2), np.float32), np.zeros(32, np.uint16),
            np.zeros(32, np.uint8), np.zeros(32, np.float64), np.ones((32, 4), np.float32), np.zeros(32, np.int32)]
    read, written = bytes_of(text, "widths", 1, 32, args)
    assert read == (0, 0, 0, 0, 0, 32 * (16 + 16 + 4), 32 * 4)
    assert written == (32 * 16, 32 * 8, 32 * 2, 32 * 1, 32 * 8, 0, 32 * 4)
    assert (args[0] == 2).all() and (args[6] == 1).all()


def test_stencil_reads_thrice_and_only_global_memory_counts():
    text = """
    #include "common.cuh"
    extern "C" __global__ void stencil(float *out, const float *in)
    {
        __shared__ float tile[64];
        extern __shared__ __align__(16) float sums[];
        float near[3];
        for (int i = 0; i < 3; ++i)
            near[i] = in[threadIdx.x + i];
        tile[threadIdx.x] = near[0] + near[1] + near[2];
        const float sum = block_sum<2>(tile[threadIdx.x], sums);
        out[threadIdx.x] = tile[63 - threadIdx.x] / sum;
    }
    """
    args = [np.zeros(64, np.float32), np.ones(66, np.float32)]
    assert bytes_of(text, "stencil", 1, 64, args, shared_bytes=8) == ((0, 3 * 64 * 4), (64 * 4, 0))


def test_asynchronous_copies_count_what_is_inside_even_where_nobody_waits():
    text = """
    #include "ptx.cuh"
    extern "C" __global__ void stage(float *out, const float *in, int size, int waited)
    {
        __shared__ __align__(16) float tile[32];
        cp_async_16(&tile[4 * threadIdx.x], in + 4 * threadIdx.x, 4 * int(threadIdx.x) < size);
        if (waited) {
            cp_async_commit();
            cp_async_wait<0>();
        }
        out[threadIdx.x] = tile[4 * threadIdx.x];
    }
    """
    for waited in (0, 1):
        args = [np.zeros(8, np.float32), np.ones(32, np.float32), np.int32(24), np.int32(waited)]
        assert bytes_of(text, "stage", 1, 8, args) == ((0, 24 * 4, 0, 0), (8 * 4, 0, 0, 0))
        assert args[0][0] == 1 or not waited


def test_counts_do_not_depend_on_the_order_and_leave_out_atomics():
    steps = 5
    for order in ORDERS:
        executor = HostExecutor(order, seed=3, count_bytes=True)
        (launch,) = run(RING, "ring", 4, 8, ring_args(steps), cooperative=True, executor=executor).launches
        assert launch.bytes_read == (0, 4 * 8 * steps * 4, 0, 0)
        assert launch.bytes_written == (4 * 8 * 4, 4 * steps * 4, 0, 0)
        assert launch.group_barriers == 4 * steps


def test_atomics_work_where_bytes_are_counted():
    text = """extern "C" __global__ void count(unsigned *out, unsigned long long *wide) {
        atomicAdd(out, 2u);
        atomicMax(out + 1, threadIdx.x);
        atomicMin(out + 2, threadIdx.x);
        if (atomicCAS(out + 3, 0u, 7u) == 7u) atomicExch(out + 4, 9u);
        atomicMax(wide, atomicAdd(wide + 1, 1ull << 40));
    }"""
    out, wide = np.array([0, 0, 99, 0, 0], np.uint32), np.zeros(2, np.uint64)
    assert bytes_of(text, "count", 4, 32, [out, wide]) == ((0, 0), (0, 0))
    assert out.tolist() == [2 * 4 * 32, 31, 0, 7, 9] and wide.tolist() == [127 << 40, 128 << 40]


def test_what_could_not_be_counted_is_refused():
    text = 'extern "C" __global__ void odd(unsigned *out) {{ {} }}'
    for statement, message in (("memcpy(out, out + 8, 32);", "memcpy"),
                               ("__atomic_fetch_or(out, 1u, __ATOMIC_RELAXED);", "__tsan_atomic32_fetch_or")):
        with pytest.raises(BuildError, match=message):
            bytes_of(text.format(statement), "odd", 1, 1, [np.zeros(16, np.uint32)])
    with pytest.raises(ValueError, match="sanitizer"):
        HostExecutor(sanitize="thread", count_bytes=True)


# ---- Deadlocks -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("body, message", [
    ("if (threadIdx.x < 40) __syncthreads();",
     (r"stuck: deadlock inside a block\n(  block 0: .*\n)?  block \d: threads 0-39 waiting in __syncthreads "
      r"\(kernels/stuck.cu:1\); threads 40-63 returned")),
    ("if (threadIdx.x < 40) __syncthreads(); \n else __syncthreads();",
     "threads of one block are in different __syncthreads"),
    ("if (threadIdx.x != 7) __shfl_sync(0xffffffff, 1, 0); else __syncthreads();",
     r"threads 0-6 waiting in __shfl_sync .*; thread 7 waiting in __syncthreads"),
    ("__any_sync(0x0000ffff, 1);", "__any_sync by a lane that its mask leaves out"),
    ("if (blockIdx.x == 0) Group(out, 0, 0, 2).barrier();",
     (r"deadlock between blocks\n  block 0: thread 0 waiting for a counter that is 1 to reach 2 "
      r"\(kernels/barrier.cuh:\d+\)")),
])
def test_deadlock_is_reported_with_who_waits_where(body, message):
    text = '#line 1\n#include "barrier.cuh"\n' if "Group" in body else ""
    with pytest.raises(Deadlock, match=message):
        run(f'{text}extern "C" __global__ void stuck(unsigned *out) {{ {body} }}', "stuck", 2, 64,
            [np.zeros(1, np.uint32)], cooperative=True)


# ---- What is refused -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("args, message", [
    ([np.zeros(4, np.float32)], "1 arguments, the kernel takes 3"),
    ([np.zeros(4, np.float64), np.zeros(4, np.int32), np.int32(4)],
     "argument 0 is an array of float64, the kernel declares float"),
    ([np.zeros(4, np.float32), np.zeros(4, np.int32), np.int64(4)], "argument 2 is int64, the kernel declares int"),
    ([np.zeros(4, np.float32), np.zeros(4, np.int32), np.float32(4)], "argument 2 is float32, the kernel declares int"),
    ([np.zeros(4, np.float32), np.int32(1), np.int32(4)], r"argument 1 is int32, the kernel declares const int \*"),
    ([np.broadcast_to(np.float32(0), 4), np.zeros(4, np.int32), np.int32(4)], "argument 0 is a read-only array"),
])
def test_arguments_that_do_not_fit_the_signature_are_refused(args, message):
    text = """extern "C" __global__ void __launch_bounds__(32)
    take(float *out, const int *__restrict__ in, const int n) {}"""
    with pytest.raises(TypeError, match=message):
        run(text, "take", 1, 1, args)


@pytest.mark.parametrize("statement", [
    "out[0] = __nv_unknown_intrinsic(out[0]);",
    "out[0] = clock64();",
    "atomicAdd(out, 1.0f);",
    'asm volatile("bar.sync 0;");',
    "float x[2] = {}; mma_unheard_of(x);",
])
def test_what_the_header_lacks_stops_the_build(statement):
    with pytest.raises(BuildError, match=r"kernels/odd.cu:2"):
        run(f'\nextern "C" __global__ void odd(float *out) {{ {statement} }}', "odd", 1, 1, [np.zeros(1, np.float32)])


# ---- What kernels use ------------------------------------------------------------------------------------------------

def test_warp_functions_equal_their_definition():
    text = """extern "C" __global__ void warp_functions(int *out, const int *in) {
        const int n = blockDim.x, i = threadIdx.x, v = in[i];
        out[i] = __shfl_sync(0xffffffff, v, i + 3);
        out[n + i] = __shfl_sync(0xffffffff, v, i + 3, 8);
        out[2 * n + i] = __shfl_up_sync(0xffffffff, v, 5);
        out[3 * n + i] = __shfl_down_sync(0xffffffff, v, 5, 16);
        out[4 * n + i] = __shfl_xor_sync(0xffffffff, v, 9);
        out[5 * n + i] = __ballot_sync(0xffffffff, v % 3 == 0);
        out[6 * n + i] = __any_sync(0xffffffff, v == in[4]) * 2 + __all_sync(0xffffffff, v > 0);
        out[7 * n + i] = i % 32 < 7 ? __shfl_sync(0x7f, v, 6) : v;
    }"""
    values = np.random.default_rng(0).integers(1, 1000, 64).astype(np.int32)
    out = HostExecutor().empty((8, 64), np.int32)
    run(text, "warp_functions", 1, 64, [out, values])
    for warp in range(2):
        v, got, i = values[32 * warp:32 * warp + 32], out[:, 32 * warp:32 * warp + 32], np.arange(32)
        np.testing.assert_array_equal(got[0], v[(i + 3) % 32])
        np.testing.assert_array_equal(got[1], v[i // 8 * 8 + (i + 3) % 8])
        np.testing.assert_array_equal(got[2], v[np.where(i < 5, i, i - 5)])
        np.testing.assert_array_equal(got[3], v[np.where(i % 16 + 5 > 15, i, i + 5) % 32])
        np.testing.assert_array_equal(got[4], v[i ^ 9])
        np.testing.assert_array_equal(got[5].view(np.uint32), sum(1 << int(lane) for lane in i if v[lane] % 3 == 0))
        np.testing.assert_array_equal(got[6], (values[4] in v) * 2 + 1)
        np.testing.assert_array_equal(got[7], np.where(i < 7, v[6], v))


def test_lanes_that_returned_are_not_waited_for():
    text = """extern "C" __global__ void tail(int *out) {
        if (threadIdx.x >= 40) return;
        out[threadIdx.x] = __popc(__ballot_sync(0xffffffff, 1));
    }"""
    for result in results_by_order(text, "tail", 1, 50, lambda: [HostExecutor().empty(40, np.int32)]):
        np.testing.assert_array_equal(result, [32] * 32 + [8] * 8)


def test_common_helpers_equal_numpy():
    text = """
    #include "common.cuh"
    extern "C" __global__ void helpers(float *out, const float *in)
    {
        __shared__ float scratch[4];
        const float x = min(max(in[threadIdx.x], -80.0f), 80.0f);
        out[threadIdx.x] = sigmoid(in[threadIdx.x]);
        out[128 + threadIdx.x] = warp_sum(x);
        out[256 + threadIdx.x] = block_sum<4>(x, scratch);
        out[384 + threadIdx.x] = block_reduce<4>(x, scratch, Maximum());
        out[512 + thread_in_grid()] = ceil_div(int(threadIdx.x), 10);
    }
    """
    values = np.random.default_rng(1).normal(0, 30, 128).astype(np.float32)
    values[:4] = [-3e38, 3e38, -100, 0]
    logistic = 1 / (1 + np.exp(-np.maximum(values.astype(np.float64), -700)))
    clipped = np.clip(values, -80, 80)
    exact = clipped.astype(np.float64)
    for result in results_by_order(text, "helpers", 1, 128,
                                   lambda: [HostExecutor().empty((5, 128), np.float32), values]):
        np.testing.assert_allclose(result[0], logistic, rtol=3e-7, atol=1e-37)
        np.testing.assert_allclose(result[1], np.repeat(exact.reshape(4, 32).sum(1), 32), rtol=1e-5, atol=1e-3)
        assert np.ptp(result[2]) == 0 and np.ptp(result[3]) == 0
        np.testing.assert_allclose(result[2, 0], np.float32(exact.sum()), rtol=1e-5, atol=1e-3)
        assert result[3, 0] == clipped.max()
        np.testing.assert_array_equal(result[4], -(-np.arange(128) // 10))


def test_atomics_count_exactly_between_blocks():
    text = """extern "C" __global__ void count(unsigned *out, int *extremes) {
        atomicAdd(out, 2u);
        atomicMax(extremes, int(blockIdx.x * blockDim.x + threadIdx.x));
        atomicMin(extremes + 1, -int(blockIdx.x));
        if (atomicCAS(out + 1, 0u, 7u) == 7u) atomicExch(out + 2, 9u);
    }"""
    out, extremes = np.zeros(3, np.uint32), np.zeros(2, np.int32)
    run(text, "count", 40, 32, [out, extremes])
    assert out.tolist() == [2 * 40 * 32, 7, 9] and extremes.tolist() == [1279, -39]


def test_a_thousand_blocks_run_a_few_at_a_time():
    text = """extern "C" __global__ void peak(int *alive, int *out) {
        atomicMax(out, atomicAdd(alive, 1) + 1);
        __syncthreads();
        if (threadIdx.x == 0) atomicAdd(alive, -int(blockDim.x));
    }"""
    alive, out = np.zeros(1, np.int32), np.zeros(1, np.int32)
    run(text, "peak", 1000, 16, [alive, out])
    assert 16 <= out[0] <= 4 * 16 and alive[0] == 0


def test_grids_and_blocks_of_three_dimensions_are_numbered_as_on_a_gpu():
    text = """extern "C" __global__ void number(int *out) {
        const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
        const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
        out[block * blockDim.x * blockDim.y * blockDim.z + thread] = 100 * blockIdx.x + 10 * threadIdx.y + threadIdx.z;
    }"""
    executor, out = HostExecutor(), HostExecutor().empty((2, 2, 3, 5, 3, 4), np.int32)
    executor.launch(text, "number", (3, 2, 2), (4, 3, 5), [out], 0, False)
    block_x, thread_y, thread_z = np.arange(3)[:, None, None, None], np.arange(3)[:, None], np.arange(5)[:, None, None]
    np.testing.assert_array_equal(out, np.broadcast_to(100 * block_x + 10 * thread_y + thread_z, out.shape))


def test_persistent_kernel_runs_in_seconds():
    text = """
    #include "common.cuh"
    #include "barrier.cuh"
    extern "C" __global__ void persist(float *out, float *cell, unsigned *counter, int steps)
    {
        Group group(counter, 0, blockIdx.x, gridDim.x);
        float value = threadIdx.x;
        for (int step = 0; step < steps; ++step) {
            value = warp_sum(value) / WARP;
            group.barrier();
            if (threadIdx.x == 0) cell[blockIdx.x] = value;
            group.barrier();
            value += cell[(blockIdx.x + 1) % gridDim.x] - value / 2;
        }
        out[thread_in_grid()] = value;
    }
    """
    executor = HostExecutor()
    args = [executor.empty(8 * 256, np.float32), executor.empty(8, np.float32), executor.zeros(1, np.uint32),
            np.int32(100)]
    executor.compile(runtime.assemble("persist.cu", text, {}))
    start = time.monotonic()
    run(text, "persist", 8, 256, args, cooperative=True, executor=executor)
    assert time.monotonic() - start < 30  # half a second on two quiet cores
    assert unwritten(args[0]) == 0 and executor.launches[0].group_barriers == 8 * 200


# ---- Graphs ----------------------------------------------------------------------------------------------------------

def test_captured_launches_and_copies_run_when_launched_with_the_arguments_they_had():
    executor, source, out, kept = HostExecutor(), *(np.zeros(64, np.float32) for _ in range(3))

    def step():
        run(REVERSE, "reverse", 1, 64, [out, source], executor=executor)
        executor.copy(kept, out)

    graph = executor.capture(step)
    assert not executor.launches
    for offset in (1, 100):
        source[...] = np.arange(64) + offset
        graph.launch()
        np.testing.assert_array_equal(kept, source[::-1])
    assert [launch.kernel for launch in executor.launches] == ["reverse", "reverse"]


def test_array_made_inside_a_capture_is_refused():
    executor = HostExecutor()
    with pytest.raises(RuntimeError, match=r"an array \(3,\) is made while launches are captured"):
        executor.capture(lambda: executor.zeros((3,), np.float32))
    assert executor.zeros((3,), np.float32).tolist() == [0, 0, 0]
