// What it costs to launch, and to wait for all blocks: kernels that do nothing else.
//   empty      nothing
//   barriers   counters (2), zero before and after: `count` barriers among all blocks of a cooperative launch
// A block owns nothing; bytes are those of the counters.
#include "barrier.cuh"

extern "C" __global__ void empty()
{
}

extern "C" __global__ void barriers(unsigned *counters, int count)
{
    for (int i = 0; i < count; i++)
        group_barrier(counters, gridDim.x * (i + 1));
    group_leave(counters, counters + 1, gridDim.x);
}
