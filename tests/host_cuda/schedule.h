// Which block goes on, where one runs at a time: a seed decides, so that the same launch does the same things again.
//
// A block is idle when all its threads wait for other blocks. Now and then, and when all are idle, the idle blocks look
// again whether they may go on.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "launch.h"

namespace host_cuda {

// Where a block may be interrupted.
enum class At { TURN, WEAK_ACCESS, STRONG_ACCESS };

class BlockSchedule {
public:
    BlockSchedule(Schedule kind, std::uint64_t seed, unsigned blocks)
        : kind(kind),
          random(seed * 0x9e3779b97f4a7c15u + 1),
          chosen(kind == Schedule::FAST ? unsigned(seed % blocks) : NONE),
          state(blocks)
    {
    }

    bool used() const { return kind != Schedule::FREE; }
    void started(unsigned block) { state[block] = State::BUSY; }
    void waits(unsigned block) { state[block] = State::IDLE; }
    void interrupted(unsigned block, At at)
    {
        if (kind == Schedule::STARVED && (at == At::STRONG_ACCESS ? chosen == NONE || draw(STAYS) == 0
                                                                  : chosen == NONE && draw(STARVES) == 0))
            chosen = block;
    }
    void ended(unsigned block) { state[block] = State::AWAY; }

    unsigned draw(unsigned n)
    {
        random = random * 6364136223846793005u + 1442695040888963407u;  // Knuth's linear congruential generator
        return unsigned((random >> 33) % n);
    }

    // Whether to interrupt a block here: most often where the order among blocks matters.
    bool interrupts(At at) { return draw(at == At::TURN ? 16 : at == At::WEAK_ACCESS ? 64 : 4) == 0; }

    // The next block; one at least has started and not ended.
    unsigned next()
    {
        if (draw(LOOKS) == 0)
            wake();
        for (;;) {
            if (kind == Schedule::FAST && state[chosen] == State::BUSY)
                return chosen;
            busy.clear();
            for (unsigned i = 0; i < state.size(); ++i)
                if (state[i] == State::BUSY && !(kind == Schedule::STARVED && i == chosen))
                    busy.push_back(i);
            if (!busy.empty())
                return busy[draw(unsigned(busy.size()))];
            if (kind == Schedule::STARVED && chosen != NONE)
                return std::exchange(chosen, NONE);
            wake();
        }
    }

private:
    enum class State { AWAY, BUSY, IDLE };
    static constexpr unsigned LOOKS = 4;  // one of so many choices wakes the idle blocks
    static constexpr unsigned STAYS = 4;  // one of so many at a strong access starves a block in place of the starved
    static constexpr unsigned STARVES = 32;  // one of so many others starves a block
    const Schedule kind;
    std::uint64_t random;
    static constexpr unsigned NONE = ~0u;
    unsigned chosen;  // the block that is starved, or fast
    std::vector<State> state;
    std::vector<unsigned> busy;

    void wake()
    {
        for (State &block : state)
            if (block == State::IDLE)
                block = State::BUSY;
    }
};

}  // namespace host_cuda
