// Which block goes on, where one runs at a time: a seed decides, so that the same launch does the same things again.
//
// A block is idle when all its threads wait for other blocks. Now and then, and when all are idle, the idle blocks look
// again whether they may go on.
#pragma once

#include <cstdint>
#include <vector>

#include "launch.h"

namespace host_cuda {

class BlockSchedule {
public:
    BlockSchedule(Schedule kind, std::uint64_t seed, unsigned blocks)
        : kind(kind), random(seed * 0x9e3779b97f4a7c15u + 1), chosen(unsigned(seed % blocks)), state(blocks)
    {
    }

    bool used() const { return kind != Schedule::FREE; }
    void started(unsigned block) { state[block] = State::BUSY; }
    void waits(unsigned block) { state[block] = State::IDLE; }
    void goes_on(unsigned block) { state[block] = State::BUSY; }
    void ended(unsigned block) { state[block] = State::AWAY; }

    unsigned draw(unsigned n)
    {
        random = random * 6364136223846793005u + 1442695040888963407u;  // Knuth's linear congruential generator
        return unsigned((random >> 33) % n);
    }

    // The next block; one at least has started and not ended.
    unsigned next()
    {
        const bool starving = kind == Schedule::STARVED && state[chosen] != State::AWAY;
        if (draw(LOOKS) == 0)
            wake();
        for (;;) {
            if (kind == Schedule::FAST && state[chosen] == State::BUSY)
                return chosen;
            busy.clear();
            for (unsigned i = 0; i < state.size(); ++i)
                if (state[i] == State::BUSY && !(starving && i == chosen))
                    busy.push_back(i);
            if (!busy.empty())
                return busy[draw(unsigned(busy.size()))];
            wake();
            if (starving)
                return chosen;
        }
    }

private:
    enum class State { AWAY, BUSY, IDLE };
    static constexpr unsigned LOOKS = 4;  // one of so many choices wakes the idle blocks
    const Schedule kind;
    std::uint64_t random;
    const unsigned chosen;  // the block that is starved, or fast
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
