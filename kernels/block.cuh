// Warps and threads of a block, the same in generation and in the persistent recurrence.
#include "common.cuh"

constexpr int WARPS = 8, THREADS = WARPS * WARP;
