"""Words with tags: what a block writes, every other block reads, step after step and launch after launch."""

import itertools

import numpy as np
import pytest

from char_gru.kernels import runtime
from char_gru.rnn.reference import rounded
from tests import host_cuda, host_ptx

RELAY = """
#include "exchange.cuh"

// Every block begins with a number, adds to it in each step the numbers of all blocks, modulo 256, and hands it on.
// words (2, blocks, 2), of which a block writes both; counters (1, COUNTER_WORDS); numbers (blocks,).
extern "C" __global__ void relay(float *numbers, Word *words, unsigned *counters, int steps)
{
    const int blocks = gridDim.x;
    const unsigned first = first_number(counters, 0);
    float number = numbers[blockIdx.x];
    for (int t = 0; t < steps; ++t) {
        const unsigned tag = tag_of(first + t);
        Word *half = words + (first + t) % 2 * blocks * 2;
        const float values[VALUES] = {number, number, number};
        if (threadIdx.x < 2 / PACKET_WORDS)
            store_packet(half + blockIdx.x * 2 + threadIdx.x * PACKET_WORDS, values, tag);
        for (int block = 0; block < blocks; ++block) {
            Word two[2];
            do
                load_two_words(two, half + block * 2);
            while (any_missing((upper_half(two[0]) ^ tag | upper_half(two[1]) ^ tag) & TAG_MASK, half + block * 2, tag,
                               TAG_MASK));
            number += decoded(two[0], two[1]);
        }
        while (number >= 256.0f)
            number -= 256.0f;
    }
    if (threadIdx.x == 0) {
        numbers[blockIdx.x] = number;
        leave_group(counters, 0, blocks, steps);
    }
}

extern "C" __global__ void packs(Word *words, const float *values, unsigned tag)
{
    float mine[VALUES];
    for (int i = 0; i < VALUES; ++i)
        mine[i] = values[thread_in_grid() * VALUES + i];
    store_packet(words + thread_in_grid() * PACKET_WORDS, mine, tag_of(tag));
}
"""
DECODED = {  # value 2 of the first packet of two words
    "fp32": "__uint_as_float(value_2(upper_half(word_0), upper_half(word_1)))",
    "tf32": "__uint_as_float(value<2>(lower_half(word_0), upper_half(word_0)) & 0xffffe000u)",
    "bf16": "from_bf16(upper_half(word_0) & 0xffffu)",
}
PRECISIONS = {"fp32": 0, "tf32": 1, "bf16": 2}


def source(precision: str) -> str:
    decoded = f"__device__ float decoded(Word word_0, Word word_1) {{ return {DECODED[precision]}; }}"
    text = RELAY.replace('#include "exchange.cuh"\n', f'#include "exchange.cuh"\n{decoded}\n')
    return runtime.assemble("relay.cu", text, {"PRECISION": PRECISIONS[precision], "VALUES": 3})


def relayed(executor, precision: str, blocks: int, launches: tuple[int, ...]) -> np.ndarray:
    """The numbers of all blocks after launches of so many steps each, which share words and counters."""
    numbers = executor.to_device(np.arange(blocks, dtype=np.float32))
    words, counters = executor.zeros((2, blocks, 2), np.uint64), executor.zeros((1, 32), np.uint32)
    for steps in launches:
        executor.launch(source(precision), "relay", (blocks, 1, 1), (32, 1, 1),
                        [numbers, words, counters, np.int32(steps)], 0, True)
    np.testing.assert_array_equal(executor.to_host(counters)[0, :2], [sum(launches), 0])
    return executor.to_host(numbers)


def expected(blocks: int, steps: int) -> np.ndarray:
    numbers = np.arange(blocks)
    for _ in range(steps):
        numbers = (numbers + numbers.sum()) % 256
    return numbers


@pytest.mark.parametrize("precision", ["fp32", *(pytest.param(name, marks=pytest.mark.capability(80))
                                                 for name in ("tf32", "bf16"))])
def test_words_arrive_however_often_their_tags_begin_anew(executor, precision):
    """tf32 has 7 bits of tag: 300 steps go through all of them twice. Launches may have any length."""
    launches = (1, 1, 3, 150, 1, 2, 142)
    np.testing.assert_array_equal(relayed(executor, precision, 3, launches), expected(3, 300))


@pytest.mark.skipif(host_cuda.compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("schedule", host_ptx.SCHEDULES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_words_arrive_in_weak_memory(precision, schedule):
    executor = host_ptx.PtxExecutor("sm_90", schedule=schedule, seed=1)
    np.testing.assert_array_equal(relayed(executor, precision, 3, (2, 140)), expected(3, 142))
    assert not executor.from_source


@pytest.mark.skipif(host_cuda.compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("right, wrong, steps", [
    ("tag_of(first + t);", "tag_of(0);", 5),  # an old word passes for a new one
    ("(first + t) % 2 * blocks", "0 * blocks", 5),  # a block overwrites what another one still needs
    ("exchanges);", "0);", 1),  # the next launch takes the words of this one
])
def test_wrong_tags_are_noticed(right, wrong, steps):
    text = source("fp32")
    assert text.count(right) == 1
    wrong_somewhere = []
    for schedule, seed in itertools.product(host_ptx.SCHEDULES, range(10)):
        executor = host_ptx.PtxExecutor("sm_90", schedule=schedule, seed=seed)
        numbers = executor.to_device(np.arange(3, dtype=np.float32))
        words, counters = executor.zeros((2, 3, 2), np.uint64), executor.zeros((1, 32), np.uint32)
        try:
            for _ in range(2):
                executor.launch(text.replace(right, wrong), "relay", (3, 1, 1), (32, 1, 1),
                                [numbers, words, counters, np.int32(steps)], 0, True)
        except RuntimeError as error:
            assert "deadlock" in str(error)
            return
        wrong_somewhere.append((executor.to_host(numbers) != expected(3, 2 * steps)).any())
    assert any(wrong_somewhere)


@pytest.mark.capability(80)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_any_value_survives_beside_any_tag(executor, precision):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((48, 3)).astype(np.float32)
    every = values.ravel()
    every[::5], every[1::7], every[2::11], every[3::13] = np.nan, np.inf, -np.inf, -0.0
    words = executor.empty((48, 2 if precision == "fp32" else 1), np.uint64)
    for tag in (0, 62, 126, 127, 65534, 65535, 2**31):
        executor.launch(source(precision), "packs", (1, 1, 1), (48, 1, 1),
                        [words, executor.to_device(values), np.uint32(tag)], 0, False)
        halves = executor.to_host(words).view(np.uint32)  # of each word the lower, then the upper
        lower, upper = halves[:, 0], halves[:, 1]
        sixteen = np.uint32(16)
        if precision == "fp32":
            bits = lower, halves[:, 2], upper << sixteen | halves[:, 3] & 0xFFFF
            tags = halves[:, 1::2] >> sixteen
        elif precision == "tf32":
            bits = lower, upper << np.uint32(6), lower << np.uint32(19) | upper >> np.uint32(13)
            tags = upper & 0x7F
        else:
            bits, tags = (lower << sixteen, lower, upper << sixteen), upper >> sixteen
        kept = {"fp32": 0xFFFFFFFF, "tf32": 0xFFFFE000, "bf16": 0xFFFF0000}[precision]
        read = np.stack([bit & np.uint32(kept) for bit in bits], axis=1).view(np.float32)
        np.testing.assert_array_equal(read, rounded(values, precision))
        np.testing.assert_array_equal(np.signbit(read[~np.isnan(read)]), np.signbit(values[~np.isnan(values)]))
        assert (tags == (tag + 1) % (128 if precision == "tf32" else 65536)).all()
