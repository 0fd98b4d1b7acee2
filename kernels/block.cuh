// The blocks of generation and of the persistent recurrence, which all have as many threads.
#include "common.cuh"

constexpr int WARPS = 8, THREADS = WARPS * WARP;
