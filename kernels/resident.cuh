// A weight-stationary product: c (ROWS, COLUMNS) = x (ROWS, K) w (K, COLUMNS), by one block, many times with other x,
// while w stays on chip.
//
// Constants from the launcher: PRECISION (precision.cuh); ROWS: 16 or 32; COLUMNS; K_GROUPS; REGISTER_STEPS.
//
// x comes from other blocks, in packets of VALUES elements (exchange.cuh) or, in 3xTF32, of one fp32 and no tag, which
// a barrier has handed over. Which elements a packet holds, the caller says when it loads w: the order of K does not
// matter to a sum. K is cut into groups of GROUP_PACKETS packets of each row, of which a warp makes GROUP_STEPS steps
// of its product, with STEP_K elements of K each. A block has WARPS warps. Each owns K_GROUPS groups, with all ROWS and
// COLUMNS, so that it reads its share of x from L2 once, straight into registers. It alone reads its share of w, from
// two places:
//   REGISTER_STEPS steps   in registers, LANE_WORDS per thread for each 8 columns (tensor cores only)
//   the other steps        in shared memory, WEIGHT_STEP words each
// Each warp ends with sums of its own. reduce_warps adds them, in shared memory of SUMS floats: the upper half of the
// warps stores its sums, the lower half adds its own to them; sum_of adds the sums of the lower half, in ascending
// order.
//
// Packets lie in the order in which warps load them (place_of). Those behind the last of a row stay zero, tag and all;
// of the others, all ROWS rows have to be written where they have tags, whether or not the matrix has these rows.
//
// Bytes per product and block: for each group of each warp ROWS GROUP_PACKETS packets from L2 and, for each step whose
// weights are not in registers, 4 WEIGHT_STEP from shared memory; then 4 WARPS * ROWS * COLUMNS of sums, written to
// shared memory and read.
// Source: Diamos et al., "Persistent RNNs: Stashing Recurrent Weights On-Chip".
#include "block.cuh"
#include "exchange.cuh"
#include "precision.cuh"

#if !defined(ROWS) || !defined(COLUMNS) || !defined(K_GROUPS) || !defined(REGISTER_STEPS)
#error "the launcher defines ROWS, COLUMNS, K_GROUPS and REGISTER_STEPS"
#endif
static_assert(ROWS == 16 || ROWS == 32, "rows come in fragments of 16");

// XWord is a word of x; a packet is X_PACKET of them. A step has STEP_K elements of K, a group GROUP_STEPS steps.
#if PRECISION == 3
using XWord = unsigned;
constexpr int X_PACKET = 1, PACKET_VALUES = 1, STEP_K = 8, GROUP_STEPS = 1;
#else
using XWord = Word;
constexpr int X_PACKET = PACKET_WORDS, PACKET_VALUES = VALUES;
constexpr int STEP_K = PRECISION == 0 ? 4 * VALUES : 8 * PACK, GROUP_STEPS = PRECISION == 0 ? 1 : VALUES;
#endif
constexpr int TILES_N = ceil_div(COLUMNS, 8);
constexpr int GROUP_PACKETS = STEP_K * GROUP_STEPS / PACKET_VALUES;  // of each row
constexpr int K_STEPS = K_GROUPS * GROUP_STEPS;
constexpr int X_GROUP = ROWS * GROUP_PACKETS * X_PACKET;        // words of x per group
constexpr size_t X_WORDS = size_t(WARPS) * K_GROUPS * X_GROUP;  // of x as multiply takes it
static_assert(REGISTER_STEPS <= K_STEPS, "no more steps in registers than there are");

// Which element of x a step multiplies: a packet of its group, and one of the packet's values.
struct Slot {
    int packet, value;
};

// The tensor-core half and the scalar half: PRECISION makes one of the two files empty, and the other one defines
//   WEIGHT_STEP                   words of a step of w in shared memory
//   place_in_group(row, packet)   where a packet of x lies in its group
//   slot_of(step, k)              the Slot of element k of a step of a group
//   WarpSums                      the sums of one warp over its share of K, zero at first
//     Step                        a step of x in registers: load_each(read) from read(row, k), where x lies elsewhere
//     X                           a group of x in registers: load(words); step<s>(), one of its steps; but for 3xTF32
//                                 missing(tag, packets), whether one of the first so many packets of a row shows
//                                 another tag, and place(), where the first packet of this lane lies
//     add(step, words)            adds a step, whose w lies where store_weights left it
//     each(take)                  calls take(row, column, sums) for each NEIGHBOURS sums of this lane in a row
//   store_weights(words, read)    puts a step of w into shared memory, from read(k, column)
//   RegisterWeights               a step of w in registers: load(read), add_to(sums, step)
#include "resident_mma.cuh"
#include "resident_scalar.cuh"

// Where a packet of a row of x lies.
__device__ __forceinline__ size_t place_of(int row, int packet)
{
    return size_t(packet / GROUP_PACKETS) * X_GROUP + place_in_group(row, packet % GROUP_PACKETS);
}

// Rows of sums are so many banks apart that what lanes store together does not collide: in fp32 those of eight rows, an
// odd multiple of 4; on tensor cores pairs of columns of four rows, 8 or 24.
constexpr int SUMS_STRIDE = TILES_N * 8 + (PRECISION == 0 ? 4 : TILES_N % 2 == 0 ? 8 : 0);
constexpr int SUMS_OF_WARP = ROWS * SUMS_STRIDE;
constexpr int SUMS = WARPS / 2 * SUMS_OF_WARP;

struct ResidentSums : WarpSums {
    // Leaves the sums of all warps in `sums`, SUMS floats of shared memory, for sum_of. A barrier has to stand between
    // the last sum_of and the next call.
    __device__ __forceinline__ void reduce_warps(float *sums)
    {
        constexpr int HALF = WARPS / 2;
        struct alignas(4 * NEIGHBOURS) Neighbours {  // stored and loaded at once
            float sums[NEIGHBOURS];
        };
        Neighbours *mine = reinterpret_cast<Neighbours *>(sums + warp() % HALF * SUMS_OF_WARP);
        const auto store = [=](int row, int column, const float *own) {
            Neighbours stored;
#pragma unroll
            for (int j = 0; j < NEIGHBOURS; ++j)
                stored.sums[j] = own[j];
            mine[(row * SUMS_STRIDE + column) / NEIGHBOURS] = stored;
        };
        if (warp() >= HALF)
            each(store);
        __syncthreads();
        if (warp() < HALF) {
            each([=](int row, int column, float *own) {  // all loads first: no load waits for a store
                const Neighbours loaded = mine[(row * SUMS_STRIDE + column) / NEIGHBOURS];
#pragma unroll
                for (int j = 0; j < NEIGHBOURS; ++j)
                    own[j] += loaded.sums[j];
            });
            each(store);
        }
        __syncthreads();
    }
};

// Element (row, column) of c after ResidentSums::reduce_warps.
__device__ __forceinline__ float sum_of(const float *sums, int row, int column)
{
    const float *sum_of_warp = sums + row * SUMS_STRIDE + column;
    float sum = sum_of_warp[0];
#pragma unroll
    for (int w = 1; w < WARPS / 2; ++w)
        sum += sum_of_warp[w * SUMS_OF_WARP];
    return sum;
}

// A warp's share of w.
struct ResidentWeights {
    RegisterWeights registers[REGISTER_STEPS > 0 ? REGISTER_STEPS : 1];
    unsigned *shared;

    static constexpr int SHARED_STEPS = K_STEPS - REGISTER_STEPS;
    static constexpr int SHARED_WORDS = WARPS * SHARED_STEPS * WEIGHT_STEP;  // of all warps

    // `all` is SHARED_WORDS of shared memory. read(packet, value, column) is 0 outside the matrix; packets count over
    // all warps.
    template <class Read>
    __device__ __forceinline__ void load(unsigned *all, Read read)
    {
        shared = all + warp() * SHARED_STEPS * WEIGHT_STEP;
        const auto read_step = [=](int step, int k, int column) {
            const Slot slot = slot_of(step % GROUP_STEPS, k);
            return read((warp() * K_GROUPS + step / GROUP_STEPS) * GROUP_PACKETS + slot.packet, slot.value,
                        column);
        };
#pragma unroll
        for (int s = 0; s < REGISTER_STEPS; ++s)
            registers[s].load([=](int k, int column) { return read_step(s, k, column); });
        for (int s = 0; s < SHARED_STEPS; ++s)
            store_weights(shared + s * WEIGHT_STEP,
                          [=](int k, int column) { return read_step(REGISTER_STEPS + s, k, column); });
        __syncwarp();  // lanes read the words that other lanes stored
    }

    // Adds this warp's share of x w. x is X_WORDS words; a row has `packets`, which are to show `tag`.
    __device__ __forceinline__ void multiply(ResidentSums &sums, const XWord *x, int packets, unsigned tag = 0) const
    {
        constexpr int WITH_REGISTERS = ceil_div(REGISTER_STEPS, GROUP_STEPS);
        const XWord *own_x = x + size_t(warp()) * K_GROUPS * X_GROUP;
        packets -= warp() * K_GROUPS * GROUP_PACKETS;  // of this warp
        WarpSums::X next;
        next.load(own_x);
#pragma unroll
        for (int group = 0; group < WITH_REGISTERS; ++group)
            add_group<true>(sums, next, own_x, group, packets - group * GROUP_PACKETS, tag);
#pragma unroll 1
        for (int group = WITH_REGISTERS; group < K_GROUPS; ++group)
            add_group<false>(sums, next, own_x, group, packets - group * GROUP_PACKETS, tag);
    }

    // Adds a group, which is in `next` or on its way there, while the one behind it is on its way to `next`; `packets`
    // are left of a row. With IN_REGISTERS, `group` has to be a constant after unrolling: an index that is known only
    // at run time would put all registers into local memory. The branch also keeps the code of the groups apart: in
    // 3xTF32 the compiler would else begin more steps at once than it has registers for.
    template <bool IN_REGISTERS>
    __device__ __forceinline__ void add_group(ResidentSums &sums, WarpSums::X &next, const XWord *own_x, int group,
                                              int packets, unsigned tag) const
    {
        if (packets <= 0)
            return;
        const XWord *from = own_x + group * X_GROUP;
        WarpSums::X now = next;
        const auto load_next = [&] {
            if (group + 1 < K_GROUPS)
                next.load(from + X_GROUP);
        };
        load_next();
#if PRECISION != 3
        const auto misses = [&] { return any_missing(now.missing(tag, packets), from + now.place(), tag, TAG_MASK); };
        if (misses()) {
            do
                now.load(from);
            while (misses());
            load_next();  // what has been loaded is likely to be too old, too
        }
#endif
        add_steps<IN_REGISTERS, 0>(sums, now, group * GROUP_STEPS);
    }

    template <bool IN_REGISTERS, int STEP>
    __device__ __forceinline__ void add_steps(ResidentSums &sums, const WarpSums::X &x, int first) const
    {
        const int step = first + STEP;
        if (IN_REGISTERS && step < REGISTER_STEPS)
            registers[step].add_to(sums, x.template step<STEP>());
        else
            sums.add(x.template step<STEP>(), shared + (step - REGISTER_STEPS) * WEIGHT_STEP);
        if constexpr (STEP + 1 < GROUP_STEPS)
            add_steps<IN_REGISTERS, STEP + 1>(sums, x, first);
    }
};
