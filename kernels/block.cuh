// Warps and threads of a block, the same in generation, in the persistent recurrence and in adam.cu.
#include "common.cuh"

constexpr int WARPS = 8, THREADS = WARPS * WARP;
