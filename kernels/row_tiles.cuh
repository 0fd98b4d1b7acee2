// Which rows of the batch a group of blocks owns in the persistent recurrence, and which elements of them a thread
// owns.
//
// The batch is cut into tiles of ROWS rows, a constant from the launcher, and the tiles into groups. A group takes its
// tiles one after the other in every step. In each of them, a block owns some hidden units, and its threads share the
// elements, a row and a unit each, to take them through the gates.
#include "block.cuh"

// Of `all` tiles of the batch, those from `first` on and before `end` belong to the group.
struct RowTiles {
    int all, first, end;

    __device__ __forceinline__ RowTiles(int B, int groups, int group) : all(ceil_div(B, ROWS))
    {
        const int of_group = ceil_div(all, groups);
        first = group * of_group, end = min(first + of_group, all);
    }
};

// The elements of this thread in any tile, when the block owns the hidden units from `j0` on and before `j_end`, which
// are UNITS at most. A thread owns places, of which a row has WIDTH, and neighbouring threads own neighbouring ones; a
// place is TOGETHER units, WIDTH apart. A thread has COUNT elements at most, place by place.
template <int UNITS, int TOGETHER = 1>
struct OwnElements {
    static constexpr int WIDTH = ceil_div(UNITS, TOGETHER);
    static constexpr int COUNT = ceil_div(ROWS * WIDTH, THREADS) * TOGETHER;

    int B, j0, j_end;

    // Row of the tile, place of that row and unit of the block, of element i.
    static __device__ __forceinline__ int row(int i) { return (int(threadIdx.x) + i / TOGETHER * THREADS) / WIDTH; }
    static __device__ __forceinline__ int place(int i) { return (int(threadIdx.x) + i / TOGETHER * THREADS) % WIDTH; }
    static __device__ __forceinline__ int unit(int i) { return place(i) + i % TOGETHER * WIDTH; }

    // Calls take(i, b, j) for each element i that lies inside the batch and the block's units: row b, hidden unit j.
    template <class Take>
    __device__ __forceinline__ void each(int tile, Take take) const
    {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int b = tile * ROWS + row(i), j = j0 + unit(i);
            if (row(i) < ROWS && b < B && unit(i) < UNITS && j < j_end)
                take(i, b, j);
        }
    }
};
