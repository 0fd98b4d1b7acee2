// Runs kernels compiled behind host_cuda.h: fibers, blocks, rendezvous, deadlock reports, poison.
//
// A launch starts one OS thread per block (all at once if it is cooperative, else a few at a time). A block's thread
// switches between the fibers of its CUDA threads in the chosen order; a fiber runs until it has to wait. Under a
// schedule, blocks are fibers, too, all of one OS thread, which take turns as the schedule has it. This file is
// compiled without sanitizer instrumentation and tells the sanitizers which stack is in use, and which
// rendezvous order memory. ThreadSanitizer thus sees every CUDA thread as a thread of its own, and races inside a
// block as well.
#define HOST_CUDA_RUNTIME
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include <link.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(HOST_CUDA_SANITIZE_ADDRESS)
#include <sanitizer/common_interface_defs.h>
#elif defined(HOST_CUDA_SANITIZE_THREAD)
#include <sanitizer/tsan_interface.h>
#endif

#include "host_cuda.h"
#include "launch.h"
#include "schedule.h"

__thread uint3 threadIdx, blockIdx;
__thread dim3 blockDim, gridDim;

namespace host_cuda {

MemoryOrder memory_order;
const char *(*source_of_ptx)(int line);

namespace {

constexpr unsigned WARP = 32;
constexpr unsigned BLOCKS_AT_ONCE = 4;   // of a launch that is not cooperative
constexpr int PATIENCE_SECONDS = 60;     // without a switch between fibers: some loop never ends
constexpr unsigned char POISON = 0xff;   // NaN in every float format, -1 as an integer
constexpr std::size_t SHARED_ALIGNMENT = 1024;
#if defined(HOST_CUDA_SANITIZE_ADDRESS) || defined(HOST_CUDA_SANITIZE_THREAD)
constexpr std::size_t STACK_BYTES = 256 * 1024;
constexpr std::size_t STACKS_KEPT = 0;  // fresh memory for every block: nothing an earlier one did is remembered
#else
constexpr std::size_t STACK_BYTES = 64 * 1024;
constexpr std::size_t STACKS_KEPT = 2 * BLOCKS_AT_ONCE;
#endif

// ---- Order of memory, as ThreadSanitizer is told of it --------------------------------------------------------------

// Everything that this fiber did so far comes before whatever follows order_after(key) in another fiber.
void order_before([[maybe_unused]] void *key)
{
#if defined(HOST_CUDA_SANITIZE_THREAD)
    __tsan_release(key);
#endif
}

void order_after([[maybe_unused]] void *key)
{
#if defined(HOST_CUDA_SANITIZE_THREAD)
    __tsan_acquire(key);
#endif
}

// The same, where a primitive of the kernel is the reason: then the memory model is told, too.
void hand_over(void *key)
{
    order_before(key);
    if (memory_order.before)
        memory_order.before(key);
}

void take_over(void *key)
{
    order_after(key);
    if (memory_order.after)
        memory_order.after(key);
}

// ---- Contexts: a stack and the registers that a call preserves ------------------------------------------------------

#if defined(__x86_64__)
using Context = void *;  // the stack pointer; the registers lie on the stack

extern "C" void host_cuda_switch(Context *from, Context to);
asm(R"(
.text
.type host_cuda_switch, @function
host_cuda_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size host_cuda_switch, .-host_cuda_switch
)");

void switch_context(Context &from, Context &to) { host_cuda_switch(&from, to); }

void make_context(Context &context, char *stack, void (*entry)())
{
    void **top = reinterpret_cast<void **>(stack + STACK_BYTES);
    *--top = nullptr;  // where a caller's return address would be: the stack is aligned as after a call
    *--top = reinterpret_cast<void *>(entry);
    for (int i = 0; i < 6; ++i)
        *--top = nullptr;
    context = top;
}
#else
using Context = ucontext_t;

void switch_context(Context &from, Context &to) { swapcontext(&from, &to); }

void make_context(Context &context, char *stack, void (*entry)())
{
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = STACK_BYTES;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}
#endif

// ---- Launch, block, fiber -------------------------------------------------------------------------------------------

class SpinLock {  // not a mutex: ThreadSanitizer would take it for an order between blocks
public:
    void lock()
    {
        while (flag.test_and_set(std::memory_order_acquire))
            sched_yield();
    }
    void unlock() { flag.clear(std::memory_order_release); }

private:
    std::atomic_flag flag = ATOMIC_FLAG_INIT;
};

class Block;
struct Fiber;

// A block that is a fiber, and what it finds in the thread's variables when it goes on.
struct ScheduledBlock {
    Context context;
    char *stack;
    Block *block;
    Fiber *self;
    uint3 thread, index;
};

struct Launch {
    LaunchRequest &request;
    const Kernel &kernel;
    const unsigned threads;
    std::atomic<unsigned> running{0};  // OS threads; a futex
    const std::vector<unsigned> order;  // of the blocks
    unsigned started = 0, scheduled_now = 0;  // of them, under a schedule
    BlockSchedule schedule;
    std::vector<ScheduledBlock> scheduled;
    ScheduledBlock caller;  // of the launch
    std::vector<std::atomic<std::uint64_t>> switches;  // per block
    std::atomic<std::uint64_t> group_barriers{0}, mma_calls{0};
    std::vector<std::vector<Event>> events;  // per block

    // Deadlock between blocks: every block has looked at its counters since the last progress of any block, in vain.
    std::atomic<std::uint64_t> quiet{0};  // number of progress reports << 32 | blocks that have looked in vain since
    std::atomic<unsigned> live;           // blocks that have not ended

    std::atomic<bool> stopped{false};
    SpinLock report_lock;
    std::string reason;
    std::vector<std::string> waiting;  // per block

    Launch(LaunchRequest &request, const Kernel &kernel, unsigned threads, std::vector<unsigned> block_order)
        : request(request),
          kernel(kernel),
          threads(threads),
          order(std::move(block_order)),
          schedule(request.schedule, request.seed, unsigned(order.size())),
          switches(order.size()),
          events(order.size()),
          live(unsigned(order.size())),
          waiting(order.size())
    {
    }

    std::uint64_t progress_count() const { return quiet >> 32; }

    void progress()
    {
        std::uint64_t old = quiet;
        while (!quiet.compare_exchange_weak(old, ((old >> 32) + 1) << 32)) {
        }
    }

    void looked_in_vain(std::uint64_t since)
    {
        std::uint64_t old = quiet;
        while (old >> 32 == since && !quiet.compare_exchange_weak(old, old + 1)) {
        }
    }

    bool deadlocked(std::uint64_t since) const
    {
        const std::uint64_t now = quiet;
        return now >> 32 == since && unsigned(now) >= live;
    }

    void stop(const std::string &why)
    {
        report_lock.lock();
        if (reason.empty())
            reason = why;
        report_lock.unlock();
        stopped = true;
    }
};

enum class State { READY, AT_BARRIER, IN_COLLECTIVE, SPINNING, RETURNED };

struct PendingCopy {
    Copy copy;
    int group;
};

struct Fiber {
    Context context;
    char *stack;
    unsigned linear;
    uint3 index;
    State state = State::READY;
    const char *name, *file;  // of the primitive it waits in, and where that was called
    int line;

    unsigned mask;  // of a collective
    bool whole;
    void *data;
    Work work;  // null for __syncwarp
    char arrived_key, met_keys[2];
    unsigned led = 0;  // __syncwarps that this fiber was the last to reach
    char *met_key;

    const unsigned *counter = nullptr;  // of a spin
    unsigned value, target;
    bool moved;  // since the turn before

    // A loop of a warp that waits for another block has a collective in each turn. A fiber that spins in vain, once
    // from one collective to the next, and comes back to the same one, has not moved.
    int collective = 0;         // the line of the last one
    bool spun = false;          // in vain, since then
    bool back_in_loop = false;  // since its turn began

    std::vector<PendingCopy> copies;
    std::size_t copies_finished = 0;
    int copy_groups = 0;

    void *tsan = nullptr;
};

class Block {
public:
    Launch &launch;
    const unsigned index;
    std::vector<Fiber> fibers;
    void *shared = nullptr;
    unsigned returned = 0;
    unsigned at_barrier = 0, barriers_passed = 0;
    char barrier_keys[2];
    std::uint64_t group_barriers = 0, mma_calls = 0;
    std::vector<Traffic> traffic;  // per argument; empty where no bytes are counted
    Traffic static_shared;         // where it lies

    Block(Launch &launch, unsigned index, const Traffic &static_shared);
    ~Block();
    void run();
    void leave(bool last);           // called by a fiber: back to run()
    void settle(void *fake_stack);  // the first thing that a fiber does in its turn
    bool meet(const Fiber &candidate);
    void access(Did did, const void *address, std::uint64_t bytes);
    void record(Did did, int argument, std::uint64_t offset, std::uint64_t size);

private:
    std::vector<unsigned> order;
    std::uint64_t random;
    char *stacks;
    Context scheduler;
    void *scheduler_tsan = nullptr;
    const void *thread_stack = nullptr;
    std::size_t thread_stack_bytes = 0;

    void enter(Fiber &fiber);
    std::string describe() const;
};

__thread Block *block;
__thread Fiber *self;

void may_interrupt(Launch &launch, unsigned index, At at);
void let_others_go_on(Launch &launch, unsigned index);

// ---- Memory of a block ----------------------------------------------------------------------------------------------

SpinLock stacks_lock;
std::vector<std::pair<std::size_t, char *>> kept_stacks;

char *take_stacks(std::size_t bytes)
{
    stacks_lock.lock();
    char *stacks = nullptr;
    for (auto kept = kept_stacks.begin(); kept != kept_stacks.end() && !stacks; ++kept)
        if (kept->first == bytes) {
            stacks = kept->second;
            kept_stacks.erase(kept);
            break;
        }
    stacks_lock.unlock();
    if (stacks)
        return stacks;
    void *fresh = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fresh == MAP_FAILED)
        abort();
    return static_cast<char *>(fresh);
}

void give_stacks(char *stacks, std::size_t bytes)
{
    stacks_lock.lock();
    const bool keep = kept_stacks.size() < STACKS_KEPT;
    if (keep)
        kept_stacks.emplace_back(bytes, stacks);
    stacks_lock.unlock();
    if (!keep)
        munmap(stacks, bytes);
}

// Static __shared__ variables are the thread-local variables of this module. This fills all of them, the ones of this
// file too, so it comes before anything else on the thread. Returns where they lie.
Traffic poison_static_shared()
{
    Traffic place = {};
    threadIdx = {};  // allocates the thread's storage
    dl_iterate_phdr(
        [](dl_phdr_info *info, std::size_t, void *place) {
            char *storage = static_cast<char *>(info->dlpi_tls_data), *mine = reinterpret_cast<char *>(&threadIdx);
            for (int i = 0; i < info->dlpi_phnum; ++i) {
                const ElfW(Phdr) &segment = info->dlpi_phdr[i];
                if (segment.p_type == PT_TLS && storage && storage <= mine && mine < storage + segment.p_memsz) {
                    std::memset(storage, POISON, segment.p_memsz);
                    *static_cast<Traffic *>(place) = {reinterpret_cast<std::uint64_t>(storage), segment.p_memsz, 0, 0};
                }
            }
            return 0;
        },
        &place);
    return place;
}

// ---- Orders ---------------------------------------------------------------------------------------------------------

void shuffle_order(std::vector<unsigned> &order, std::uint64_t &random)
{
    for (unsigned i = order.size(); i > 1; --i) {
        random = random * 6364136223846793005u + 1442695040888963407u;  // Knuth's linear congruential generator
        std::swap(order[i - 1], order[(random >> 33) % i]);
    }
}

// 0 to count - 1, ascending or descending; the random order starts from ascending.
std::vector<unsigned> first_order(Order order, unsigned count)
{
    std::vector<unsigned> indices(count);
    std::iota(indices.begin(), indices.end(), 0u);
    if (order == Order::DESCENDING)
        std::reverse(indices.begin(), indices.end());
    return indices;
}

// ---- Fibers ---------------------------------------------------------------------------------------------------------

void fiber_entry()
{
    block->settle(nullptr);
    block->launch.kernel.call(block->launch.request.arguments);
    for (Copy copy; next_finished_copy(-1, copy);)  // never committed or waited for, but read all the same
        if (copy.inside)
            count_read(copy.source, copy.bytes);
    order_before(&block->launch);
    self->state = State::RETURNED;
    ++block->returned;
    const unsigned first = self->linear / WARP * WARP;
    for (unsigned i = first; i < first + WARP && i < block->fibers.size(); ++i)
        if (block->fibers[i].state == State::IN_COLLECTIVE)
            block->meet(block->fibers[i]);
    block->leave(true);
}

Block::Block(Launch &launch, unsigned index, const Traffic &static_shared)
    : launch(launch),
      index(index),
      fibers(launch.threads),
      static_shared(static_shared),
      order(first_order(launch.request.order, launch.threads)),
      random(launch.request.seed * 0x9e3779b97f4a7c15u + index),
      stacks(take_stacks(launch.threads * STACK_BYTES))
{
    for (int i = 0; launch.request.traffic && i < launch.kernel.parameter_count; ++i)
        traffic.push_back({launch.request.traffic[i].start, launch.request.traffic[i].size, 0, 0});
    const std::size_t shared_bytes = launch.kernel.shared_bytes + launch.request.shared_bytes;
    if (shared_bytes > 0) {
        const std::size_t shadow_bytes = launch.kernel.shared_shadow ? shared_bytes : 0;
        if (posix_memalign(&shared, SHARED_ALIGNMENT, shared_bytes + shadow_bytes))
            abort();
        std::memset(shared, POISON, shared_bytes);
        std::memset(static_cast<char *>(shared) + shared_bytes, 0, shadow_bytes);
    }
    const unsigned *extent = launch.request.block;
    for (unsigned i = 0; i < fibers.size(); ++i) {
        Fiber &fiber = fibers[i];
        fiber.linear = i;
        fiber.index = {i % extent[0], i / extent[0] % extent[1], i / extent[0] / extent[1]};
        fiber.stack = stacks + i * STACK_BYTES;
        make_context(fiber.context, fiber.stack, fiber_entry);
#if defined(HOST_CUDA_SANITIZE_THREAD)
        fiber.tsan = __tsan_create_fiber(0);
#endif
    }
#if defined(HOST_CUDA_SANITIZE_THREAD)
    scheduler_tsan = __tsan_get_current_fiber();
#endif
}

Block::~Block()
{
#if defined(HOST_CUDA_SANITIZE_THREAD)
    for (Fiber &fiber : fibers)
        __tsan_destroy_fiber(fiber.tsan);
#endif
    order_after(&launch);  // the fibers' copies are freed here
    give_stacks(stacks, launch.threads * STACK_BYTES);
    std::free(shared);
}

void Block::enter(Fiber &fiber)
{
    self = &fiber;
    threadIdx = fiber.index;
#if defined(HOST_CUDA_SANITIZE_THREAD)
    __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
#elif defined(HOST_CUDA_SANITIZE_ADDRESS)
    void *fake_stack;
    __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, STACK_BYTES);
#endif
    switch_context(scheduler, fiber.context);
#if defined(HOST_CUDA_SANITIZE_ADDRESS)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void Block::leave([[maybe_unused]] bool last)
{
    void *fake_stack = nullptr;
#if defined(HOST_CUDA_SANITIZE_THREAD)
    __tsan_switch_to_fiber(scheduler_tsan, __tsan_switch_to_fiber_no_sync);
#elif defined(HOST_CUDA_SANITIZE_ADDRESS)
    __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack, thread_stack, thread_stack_bytes);
#endif
    switch_context(self->context, scheduler);
    settle(fake_stack);
}

void Block::settle([[maybe_unused]] void *fake_stack)
{
#if defined(HOST_CUDA_SANITIZE_ADDRESS)
    __sanitizer_finish_switch_fiber(fake_stack, &thread_stack, &thread_stack_bytes);
#endif
}

void Block::run()
{
    // A turn of a loop that waits, from one look to the next, takes up to three turns of its fibers.
    constexpr int LOOKS = 4;
    std::uint64_t looked_since = ~std::uint64_t(0);
    int looks = 0;
    while (returned < fibers.size() && !launch.stopped) {
        if (launch.request.order == Order::RANDOM)
            shuffle_order(order, random);
        const std::uint64_t since = launch.progress_count();
        bool moved = false, spinning = false;
        for (unsigned i : order) {
            Fiber &fiber = fibers[i];
            if (fiber.state != State::READY && fiber.state != State::SPINNING)
                continue;
            fiber.back_in_loop = false;
            enter(fiber);
            launch.switches[index].fetch_add(1, std::memory_order_relaxed);
            if (launch.stopped)
                break;
            spinning |= fiber.state == State::SPINNING || fiber.back_in_loop;
            moved |= fiber.state == State::SPINNING ? fiber.moved : !fiber.back_in_loop;
            may_interrupt(launch, index, At::TURN);
        }
        if (moved) {
            launch.progress();
        } else if (!spinning) {
            launch.stop("deadlock inside a block");
        } else {
            looks = looked_since == since ? looks + 1 : 1;
            looked_since = since;
            if (looks == LOOKS)
                launch.looked_in_vain(since);
            if (launch.deadlocked(since))
                launch.stop("deadlock between blocks");
            if (launch.schedule.used()) {
                launch.schedule.waits(index);
                let_others_go_on(launch, index);
            } else {
                sched_yield();
            }
        }
    }
    if (launch.stopped)
        launch.waiting[index] = describe();
    launch.group_barriers += group_barriers;
    launch.mma_calls += mma_calls;
    for (std::size_t i = 0; i < traffic.size(); ++i) {
        std::atomic_ref(launch.request.traffic[i].read) += traffic[i].read;
        std::atomic_ref(launch.request.traffic[i].written) += traffic[i].written;
    }
    launch.progress();
    --launch.live;  // only now: a block that looks before sees everything that this one wrote
}

// An access belongs to the first argument whose array it starts in.
void Block::access(Did did, const void *address, std::uint64_t bytes)
{
    const std::uint64_t first = reinterpret_cast<std::uint64_t>(address);
    for (Traffic &argument : traffic)
        if (first - argument.start < argument.size) {
            if (did == Did::READ)
                argument.read += bytes;
            if (did == Did::WRITE)
                argument.written += bytes;
            record(did, int(&argument - traffic.data()), first - argument.start, bytes);
            return;
        }
    const auto inside = [=](const uint3 &built_in) {
        return first - reinterpret_cast<std::uint64_t>(&built_in) < sizeof(built_in);
    };
    if (first - reinterpret_cast<std::uint64_t>(shared) < launch.request.shared_bytes ||
        (first - static_shared.start < static_shared.size && !inside(threadIdx) && !inside(blockIdx) &&
         !inside(blockDim) && !inside(gridDim)))
        record(did, -1, 0, bytes);
}

void Block::record(Did did, int argument, std::uint64_t offset, std::uint64_t size)
{
    if (launch.request.recording)
        launch.events[index].push_back({index, self->linear, did, argument, offset, size});
}

std::string Block::describe() const
{
    const auto what = [](const Fiber &fiber) -> std::string {
        if (fiber.state == State::RETURNED)
            return "returned";
        if (fiber.state == State::READY)
            return "can go on";
        const std::string line = std::to_string(fiber.line);
        const std::string place = source_of_ptx && std::strcmp(fiber.file, "PTX") == 0
                                      ? " (PTX line " + line + " (" + source_of_ptx(fiber.line) + "))"
                                      : std::string(" (") + fiber.file + ":" + line + ")";
        if (fiber.state == State::SPINNING)
            return "waiting for a counter that is " + std::to_string(fiber.value) + " to reach " +
                   std::to_string(fiber.target) + place;
        return std::string("waiting in ") + fiber.name + place;
    };
    std::string text = "block " + std::to_string(index) + ":";
    for (unsigned first = 0, last; first < fibers.size(); first = last + 1) {
        const std::string here = what(fibers[first]);
        for (last = first; last + 1 < fibers.size() && what(fibers[last + 1]) == here;)
            ++last;
        text += (first ? "; " : " ") + std::string(first == last ? "thread " : "threads ") + std::to_string(first) +
                (first == last ? "" : "-" + std::to_string(last)) + " " + here;
    }
    return text;
}

// Lets the collective that the candidate waits in happen, if all of its lanes are there.
bool Block::meet(const Fiber &candidate)
{
    Fiber *lanes[WARP] = {};
    void *data[WARP] = {};
    const unsigned first = candidate.linear / WARP * WARP;
    for (unsigned lane = 0; lane < WARP; ++lane) {
        if (!(candidate.mask >> lane & 1))
            continue;
        Fiber *fiber = first + lane < fibers.size() ? &fibers[first + lane] : nullptr;
        if (!fiber || fiber->state == State::RETURNED) {
            if (candidate.whole)
                return false;
            continue;
        }
        if (fiber->state != State::IN_COLLECTIVE || fiber->mask != candidate.mask || fiber->work != candidate.work ||
            std::strcmp(fiber->name, candidate.name) != 0)
            return false;
        lanes[lane] = fiber;
        data[lane] = fiber->data;
    }
    record(Did::COLLECTIVE, -1, reinterpret_cast<std::uint64_t>(candidate.name), 0);
    if (candidate.work) {
        candidate.work(data);
    } else {
        for (Fiber *fiber : lanes)
            if (fiber)
                take_over(&fiber->arrived_key);
        char *key = &self->met_keys[self->led++ % 2];
        hand_over(key);
        for (Fiber *fiber : lanes)
            if (fiber)
                fiber->met_key = key;
    }
    for (Fiber *fiber : lanes)
        if (fiber)
            fiber->state = State::READY;
    return true;
}

void wait_in_collective(const char *name, unsigned mask, bool whole, void *data, Work work, const char *file, int line)
{
    Fiber &fiber = *self;
    fiber.back_in_loop = fiber.spun && line == fiber.collective;
    fiber.collective = line;
    fiber.spun = false;
    fiber.state = State::IN_COLLECTIVE;
    fiber.name = name;
    fiber.file = file;
    fiber.line = line;
    fiber.mask = mask;
    fiber.whole = whole;
    fiber.data = data;
    fiber.work = work;
    if (!(mask >> fiber.linear % WARP & 1))
        block->launch.stop(std::string(name) + " by a lane that its mask leaves out");
    if (block->launch.stopped || !block->meet(fiber))
        block->leave(false);
}

struct Shuffled {
    std::uint64_t bits;
    int source;
    std::uint64_t result;
};

struct Vote {
    bool predicate;
    unsigned result;
};

// ---- Blocks ---------------------------------------------------------------------------------------------------------

void run_block(Launch &launch, unsigned index)
{
    // Under a schedule, blocks share the thread: kernels come from PTX, and have all shared memory in Block::shared.
    const Traffic static_shared = launch.schedule.used() ? Traffic{} : poison_static_shared();
    const auto extent = [](const std::uint32_t (&n)[3]) { return dim3{n[0], n[1], n[2]}; };
    gridDim = extent(launch.request.grid);
    blockDim = extent(launch.request.block);
    blockIdx = {index % gridDim.x, index / gridDim.x % gridDim.y, index / gridDim.x / gridDim.y};
    {
        Block mine(launch, index, static_shared);
        block = &mine;
        mine.run();
    }
}

// The end of an OS thread of the launch.
void finish(Launch &launch)
{
    std::atomic<unsigned> &running = launch.running;
    --running;  // the launch may be gone from here on
    syscall(SYS_futex, &running, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
}

// Waits until at most `limit` blocks are running. False if one of them runs on and on.
bool wait_for_blocks(Launch &launch, unsigned limit)
{
    std::uint64_t switches = 0;
    for (int seconds = 0; seconds < PATIENCE_SECONDS;) {
        const unsigned running = launch.running;
        if (running <= limit)
            return true;
        const timespec second = {1, 0};
        if (syscall(SYS_futex, &launch.running, FUTEX_WAIT_PRIVATE, running, &second, nullptr, 0) == 0 ||
            errno != ETIMEDOUT)
            continue;
        std::uint64_t total = 0;
        for (const auto &count : launch.switches)
            total += count;
        seconds = total == switches ? seconds + 1 : 0;
        switches = total;
    }
    return false;
}

// ---- Blocks under a schedule ----------------------------------------------------------------------------------------

void switch_blocks(ScheduledBlock &from, ScheduledBlock &to)
{
    from.block = block;
    from.self = self;
    from.thread = threadIdx;
    from.index = blockIdx;
    switch_context(from.context, to.context);
    block = from.block;
    self = from.self;
    threadIdx = from.thread;
    blockIdx = from.index;
}

void let_others_go_on(Launch &launch, unsigned index)
{
    const unsigned next = launch.schedule.next();
    if (next != index)
        switch_blocks(launch.scheduled[index], launch.scheduled[next]);
}

void may_interrupt(Launch &launch, unsigned index, At at)
{
    if (launch.schedule.used() && launch.schedule.interrupts(at)) {
        launch.schedule.interrupted(index, at);
        let_others_go_on(launch, index);
    }
}

__thread Launch *scheduled_launch;

void scheduled_entry();

void start_scheduled(Launch &launch)
{
    const unsigned index = launch.order[launch.started++];
    ScheduledBlock &mine = launch.scheduled[index];
    mine.stack = take_stacks(STACK_BYTES);
    make_context(mine.context, mine.stack, scheduled_entry);
    launch.schedule.started(index);
    ++launch.scheduled_now;
}

// The next block is known by whose stack this is.
void scheduled_entry()
{
    Launch &launch = *scheduled_launch;
    const char here = 0;
    unsigned index = 0;
    while (std::uintptr_t(&here) - std::uintptr_t(launch.scheduled[index].stack) >= STACK_BYTES)
        ++index;
    run_block(launch, index);
    launch.schedule.ended(index);
    if (!launch.stopped && launch.started < launch.order.size())
        start_scheduled(launch);
    ScheduledBlock &next = --launch.scheduled_now ? launch.scheduled[launch.schedule.next()] : launch.caller;
    switch_blocks(launch.scheduled[index], next);
}

void run_scheduled(Launch &launch, unsigned at_once)
{
    launch.scheduled.resize(launch.order.size());
    scheduled_launch = &launch;
    while (launch.started < at_once)
        start_scheduled(launch);
    switch_blocks(launch.caller, launch.scheduled[launch.schedule.next()]);
    for (unsigned i = 0; i < launch.started; ++i)
        give_stacks(launch.scheduled[launch.order[i]].stack, STACK_BYTES);
}

}  // namespace

// ---- What host_cuda.h declares --------------------------------------------------------------------------------------

void sync_threads(const char *file, int line)
{
    Fiber &fiber = *self;
    char *key = &block->barrier_keys[block->barriers_passed % 2];
    hand_over(key);
    fiber.state = State::AT_BARRIER;
    fiber.name = "__syncthreads";
    fiber.file = file;
    fiber.line = line;
    bool together = ++block->at_barrier == block->fibers.size();
    if (together)
        for (const Fiber &other : block->fibers)
            if (std::strcmp(other.file, file) != 0 || other.line != line) {
                block->launch.stop("threads of one block are in different __syncthreads");
                together = false;
            }
    if (together) {
        block->record(Did::BARRIER, -1, 0, 0);
        block->at_barrier = 0;
        ++block->barriers_passed;
        for (Fiber &other : block->fibers)
            other.state = State::READY;
    } else {
        block->leave(false);
    }
    take_over(key);
}

void sync_warp(unsigned mask, const char *file, int line)
{
    hand_over(&self->arrived_key);
    wait_in_collective("__syncwarp", mask, false, nullptr, nullptr, file, line);
    take_over(self->met_key);
}

void whole_warp(const char *name, void *data, Work work, const char *file, int line)
{
    wait_in_collective(name, 0xffffffffu, true, data, work, file, line);
}

std::uint64_t shuffle(const char *name, unsigned mask, std::uint64_t bits, int source, const char *file, int line)
{
    Shuffled mine = {bits, source, 0};
    const Work work = [](void *const *lanes) {
        for (unsigned lane = 0; lane < WARP; ++lane)
            if (Shuffled *to = static_cast<Shuffled *>(lanes[lane])) {
                const Shuffled *from = static_cast<const Shuffled *>(lanes[to->source % WARP]);
                to->result = from ? from->bits : ~std::uint64_t(0);  // a lane that takes no part: poison
            }
    };
    wait_in_collective(name, mask, false, &mine, work, file, line);
    return mine.result;
}

unsigned ballot(const char *name, unsigned mask, bool predicate, const char *file, int line)
{
    Vote mine = {predicate, 0};
    const Work work = [](void *const *lanes) {
        unsigned result = 0;
        for (unsigned lane = 0; lane < WARP; ++lane)
            if (lanes[lane] && static_cast<const Vote *>(lanes[lane])->predicate)
                result |= 1u << lane;
        for (unsigned lane = 0; lane < WARP; ++lane)
            if (lanes[lane])
                static_cast<Vote *>(lanes[lane])->result = result;
    };
    wait_in_collective(name, mask, false, &mine, work, file, line);
    return mine.result;
}

void spin_pause(const unsigned *counter, unsigned value, unsigned target, const char *file, int line)
{
    Fiber &fiber = *self;
    fiber.moved = counter != fiber.counter || value != fiber.value || target != fiber.target;
    fiber.spun = !fiber.moved;
    fiber.state = State::SPINNING;
    fiber.file = file;
    fiber.line = line;
    fiber.counter = counter;
    fiber.value = value;
    fiber.target = target;
    if (!block->launch.request.cooperative)
        block->launch.stop("a block waits for another in a launch that is not cooperative");
    block->leave(false);
    fiber.state = State::READY;
}

void may_interrupt(bool strong)
{
    may_interrupt(block->launch, block->index, strong ? At::STRONG_ACCESS : At::WEAK_ACCESS);
}

void *dynamic_shared() { return block->shared; }

std::size_t shared_bytes() { return block->launch.kernel.shared_bytes + block->launch.request.shared_bytes; }

void stop(const char *why)
{
    block->launch.stop(why);
    block->leave(false);
    std::abort();  // a stopped block gives no more turns
}

void fence()
{
    static char key;
    std::atomic_thread_fence(std::memory_order_seq_cst);
    order_after(&key);
    order_before(&key);
}

void count_group_barrier(const unsigned *counter)
{
    ++block->group_barriers;
    block->access(Did::ARRIVE, counter, sizeof(*counter));
}

void count_mma() { ++block->mma_calls; }

void count_read(const void *address, std::uint64_t bytes) { block->access(Did::READ, address, bytes); }

void count_write(const void *address, std::uint64_t bytes) { block->access(Did::WRITE, address, bytes); }

void record_atomic(const void *address, std::uint64_t bytes) { block->access(Did::ATOMIC, address, bytes); }

void record_wait(const unsigned *counter, unsigned target) { block->access(Did::WAIT, counter, target); }

int lane_in_warp() { return int(self->linear % WARP); }

void copy_later(void *target, const void *source, int bytes, bool inside)
{
    self->copies.push_back({{target, source, bytes, inside}, self->copy_groups});
}

void commit_copies() { ++self->copy_groups; }

bool next_finished_copy(int pending, Copy &copy)
{
    Fiber &fiber = *self;
    if (fiber.copies_finished == fiber.copies.size()) {
        fiber.copies.clear();
        fiber.copies_finished = 0;
        return false;
    }
    const PendingCopy &next = fiber.copies[fiber.copies_finished];
    if (next.group >= fiber.copy_groups - pending)
        return false;
    copy = next.copy;
    ++fiber.copies_finished;
    return true;
}

}  // namespace host_cuda

extern "C" __attribute__((visibility("default"))) const char *host_cuda_launch(LaunchRequest *request)
{
    using namespace host_cuda;
    static std::string report;
    static std::vector<Event> events;
    const Kernel *kernel = kernels;
    while (std::strcmp(kernel->name, request->kernel) != 0)
        ++kernel;
    const unsigned threads = request->block[0] * request->block[1] * request->block[2];
    const unsigned blocks = request->grid[0] * request->grid[1] * request->grid[2];
    std::vector<unsigned> order = first_order(request->order, blocks);
    std::uint64_t random = request->seed;
    if (request->order == Order::RANDOM)
        shuffle_order(order, random);
    Launch *launch = new Launch(*request, *kernel, threads, order);
    bool ended = true;
    if (launch->schedule.used()) {
        ++launch->running;
        std::thread([=] {
            run_scheduled(*launch, launch->request.cooperative ? blocks : std::min(blocks, BLOCKS_AT_ONCE));
            finish(*launch);
        }).detach();
    } else {
        for (unsigned index : order) {
            ended = request->cooperative || wait_for_blocks(*launch, BLOCKS_AT_ONCE - 1);
            if (!ended || launch->stopped)
                break;
            ++launch->running;
            std::thread([=] {
                run_block(*launch, index);
                finish(*launch);
            }).detach();
        }
    }
    ended = ended && wait_for_blocks(*launch, 0);
    if (!ended) {  // the launch stays, for the threads that still use it
        report = "no thread of any block has waited or returned for " + std::to_string(PATIENCE_SECONDS) +
                 " s: a loop without end";
        return report.c_str();
    }
    order_after(launch);
    request->group_barriers = launch->group_barriers;
    request->mma_calls = launch->mma_calls;
    events.clear();
    for (const std::vector<Event> &of_block : launch->events)
        events.insert(events.end(), of_block.begin(), of_block.end());
    request->events = events.data();
    request->event_count = events.size();
    report = launch->reason;
    for (const std::string &text : launch->waiting)
        if (!text.empty())
            report += "\n  " + text;
    delete launch;
    return report.empty() ? nullptr : report.c_str();
}

extern "C" __attribute__((visibility("default"))) const char *host_cuda_signatures()
{
    using namespace host_cuda;
    static std::string text;
    text.clear();
    for (const Kernel *kernel = kernels; kernel->name; ++kernel) {
        text += kernel->name;
        for (int i = 0; i < kernel->parameter_count; ++i) {
            const Parameter &parameter = kernel->parameters[i];
            text += std::string(" ") + parameter.kind + std::to_string(parameter.bytes) +
                    (parameter.pointer ? "*" : "") + (parameter.readonly ? "c" : "");
        }
        text += '\n';
    }
    return text.c_str();
}
