// Wavefronts of shared memory, which has 32 banks of 4 bytes: what the accesses of block 0 take, by PTX line.
//
// The lanes of a warp are served together where each accesses 4 bytes or fewer, the halves of the warp one after the
// other for 8 bytes, its quarters for 16. What is served together takes as many wavefronts as the most words that one
// bank has to give. A thread's n-th access at a PTX line counts as one with the n-th of the other lanes.
// Source: CUDA C++ Programming Guide, "Shared Memory" of compute capability 5.x and later.
#pragma once

struct Accesses {  // at a PTX line
    static constexpr u32 NONE = ~0u;

    struct Warp {
        u32 counts[32] = {};       // of the lanes' accesses so far
        std::vector<u32> offsets;  // 32 for each access, NONE where a lane has none
    };

    int bytes = 4;
    std::map<int, Warp> warps;
};

static std::map<int, Accesses> accesses;

PTX_CALL void on_banks(u32 offset, int bytes, int line)
{
    if (blockIdx.x || blockIdx.y || blockIdx.z)
        return;
    const int thread = int((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x), lane = thread % 32;
    Accesses &here = accesses[line];
    here.bytes = bytes;
    Accesses::Warp &warp = here.warps[thread / 32];
    const u32 place = 32 * warp.counts[lane]++ + lane;
    if (place >= warp.offsets.size())
        warp.offsets.resize(place / 32 * 32 + 32, Accesses::NONE);
    warp.offsets[place] = offset;
}

// The lanes from first on that are served together.
static int wavefronts_of(const u32 *offsets, int first, int lanes, int bytes)
{
    std::vector<u32> words;
    for (int lane = first; lane < first + lanes; ++lane)
        for (int at = 0; offsets[lane] != Accesses::NONE && at < bytes; at += 4)
            words.push_back((offsets[lane] + at) / 4);
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    int of_bank[32] = {};
    for (const u32 word : words)
        ++of_bank[word % 32];
    return *std::max_element(of_bank, of_bank + 32);
}

// The accesses of warps at a PTX line since the library was loaded: how many, the wavefronts that they take, and the
// fewest that any addresses would take.
PTX_EXPORT void ptx_wavefronts(int line, u64 counted[3])
{
    counted[0] = counted[1] = counted[2] = 0;
    const auto found = accesses.find(line);
    if (found == accesses.end())
        return;
    const int bytes = found->second.bytes, lanes = bytes <= 4 ? 32 : 128 / bytes;
    for (const auto &[number, warp] : found->second.warps)
        for (std::size_t access = 0; access < warp.offsets.size(); access += 32) {
            ++counted[0];
            for (int first = 0; first < 32; first += lanes) {
                const int taken = wavefronts_of(&warp.offsets[access], first, lanes, bytes);
                counted[1] += taken;
                counted[2] += taken > 0;
            }
        }
}
