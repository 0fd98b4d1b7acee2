// Kernels that only launch, or only wait for all blocks, to measure what both cost.
//   empty      nothing
//   barriers   counters (2), zero before and after: `count` barriers among all blocks of a cooperative launch
// A block owns nothing; only the counters are read and written.
#include "barrier.cuh"

extern "C" __global__ void empty()
{
}

extern "C" __global__ void barriers(unsigned *counters, int count)
{
    Group group(counters, 0, blockIdx.x, gridDim.x);
    for (int i = 0; i < count; i++)
        group.barrier();
    group.leave();
}
