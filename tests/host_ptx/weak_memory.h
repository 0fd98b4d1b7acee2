// Global memory as late and as stale as the PTX memory model allows.
//
// A word of 8 bytes that a launch writes has a history: its messages, which are the writes to it, in coherence order.
// A load gives the value that the word had at one of its messages, of which none may be older than the newest write
// that comes before the load in causality order; which one, a seed decides. All stores and copies go to the real
// memory as well, so that it holds the newest values when the launch ends.
//
// Causality order is kept by vector clocks. The writes of a thread belong to its epochs, numbered from 0; the clock of
// a thread says of each thread how many epochs it knows of. What hands clocks on:
//   __syncthreads(), __syncwarp()     from all threads that take part to all of them
//   a release (red, atom, st, fence)  the clock travels with the message, and with those of the atomics that follow it
//   an acquire (ld, atom, fence)      takes over the clock of the message that was read
//   fence.sc, membar                  also from each such fence to all later ones
// A strong load (relaxed, acquire, volatile, atomics) of a strong write puts this write, and nothing else, into the
// clock of its thread. It is not torn, and a loop of them finds a new value after a finite number of turns. A weak load
// leaves no trace: the next one may give an older value. Between blocks, an operation of scope .cta is weak.
//
// Not shown: values that a thread writes only after the load (load buffering); writes that overtake each other in the
// coherence order of one word. Shared memory has its effect at once.
// Source: PTX ISA, "Memory Consistency Model". Lustig, Sahasrabuddhe and Giroux, "A Formal Analysis of the NVIDIA PTX
// Memory Consistency Model", 2019, has the model; the operational form by histories and clocks is that of Kang, Hur,
// Lahav, Vafeiadis and Dreyer, "A Promising Semantics for Relaxed-Memory Concurrency", 2017, without its promises.
#pragma once

struct Clock {
    std::vector<u32> epochs;                 // by thread: how many of its epochs are known
    std::vector<std::pair<u64, u32>> reads;  // address / 4 -> number of the message that a strong load has read there

    bool knows(u32 thread, u32 epoch) const { return epoch < epochs[thread]; }

    u32 read_at(u64 address) const
    {
        const auto read = std::lower_bound(reads.begin(), reads.end(), std::pair(address / 4, 0u));
        return read != reads.end() && read->first == address / 4 ? read->second : 0;
    }

    void remember(u64 place, u32 message)
    {
        const auto read = std::lower_bound(reads.begin(), reads.end(), std::pair(place, 0u));
        if (read == reads.end() || read->first != place)
            reads.emplace(read, place, message);
        else
            read->second = read->second < message ? message : read->second;
    }

    [[gnu::optimize("O3")]] void join(const Clock &other)
    {
        for (std::size_t i = 0; i < epochs.size(); ++i)
            epochs[i] = epochs[i] < other.epochs[i] ? other.epochs[i] : epochs[i];
        if (other.reads.empty() || reads == other.reads)
            return;
        std::vector<std::pair<u64, u32>> both;  // by place, then by message: the last of a place is the newest
        both.reserve(reads.size() + other.reads.size());
        std::merge(reads.begin(), reads.end(), other.reads.begin(), other.reads.end(), std::back_inserter(both));
        reads.clear();
        for (const auto &read : both)
            if (!reads.empty() && reads.back().first == read.first)
                reads.back() = read;
            else
                reads.push_back(read);
    }
};

using Known = std::shared_ptr<Clock>;  // not changed while two share it

PTX_CALL Clock &changeable(Known &known)
{
    if (known.use_count() > 1)
        known = std::make_shared<Clock>(*known);
    return *known;
}

PTX_CALL void join(Known &known, const Known &other)
{
    if (!other || known == other)
        return;
    if (known)
        changeable(known).join(*other);
    else
        known = other;
}

struct Message {
    u64 value;  // of the bytes that were written, at their place in the word
    u64 bytes;  // 0xff in each of them
    u32 thread, epoch;
    bool strong;
    Known released, released_in_block;  // for acquires in any block; for those in the block of `thread`
};

constexpr u32 NOBODY = ~0u;      // the thread of values from before the launch
constexpr std::size_t KEPT = 8;  // messages per word; older ones become the value that everyone knows

struct History {
    std::vector<Message> messages;  // the first has all bytes
    u32 forgotten = 0;              // its number: messages count from the value before the launch, which is 0
};

struct Thread {
    Known known;
    u32 epoch = 0;
    Known seen, seen_in_block;          // clocks of messages that it has read: an acquire fence takes them over
    Known released, released_in_block;  // by its latest release fence: its relaxed stores carry them
    std::vector<Known> copies;          // at the start of each asynchronous copy
    std::size_t copies_finished = 0;
};

struct HandedOver {
    Known all;       // joined
    Known parts[2];  // the latest of the clocks that were handed over
    bool has(const Known &known) const { return known == parts[0] || known == parts[1]; }
};

static std::vector<Thread> memory_threads;
static std::vector<History *> memory_words;  // by place in the shadow of the arrays, divided by 8
static std::vector<std::unique_ptr<History>> memory_histories;
static std::map<std::pair<u32, void *>, HandedOver> memory_keys;  // block and key
static Known memory_fences;  // what each fence.sc has handed on
static u64 memory_random;

PTX u32 memory_draw(u32 n)
{
    memory_random = memory_random * 6364136223846793005u + 1442695040888963407u;  // Knuth's generator
    return u32(memory_random >> 33) % n;
}

PTX u32 block_threads() { return blockDim.x * blockDim.y * blockDim.z; }

PTX u32 this_thread()
{
    const u32 block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    return block * block_threads() + (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
}

// Everything that the thread knows and did, for others to take over.
PTX_CALL Known release(Thread &thread, u32 number)
{
    Known released = std::make_shared<Clock>(*thread.known);
    released->epochs[number] = ++thread.epoch;
    return released;
}

PTX_CALL HandedOver &handed_over(void *key) { return memory_keys[{this_thread() / block_threads(), key}]; }

PTX_CALL void memory_hand_over(void *key)
{
    const u32 number = this_thread();
    Thread &thread = memory_threads[number];
    HandedOver &handed = handed_over(key);
    if (!handed.has(thread.known)) {
        join(handed.all, thread.known);
        handed.parts[1] = std::exchange(handed.parts[0], thread.known);
    }
    changeable(handed.all).epochs[number] = ++thread.epoch;
}

PTX_CALL void memory_take_over(void *key)
{
    Thread &thread = memory_threads[this_thread()];
    const HandedOver &handed = handed_over(key);
    if (handed.has(thread.known))  // `all` holds whatever it knows: after a barrier, the threads share one clock
        thread.known = handed.all;
    else
        join(thread.known, handed.all);
}

// Ahead of each launch. `seed` decides which of the possible values loads give.
PTX_EXPORT void ptx_memory(u32 threads, u64 shadow_bytes, u64 seed)
{
    Known nothing = std::make_shared<Clock>();
    nothing->epochs.resize(threads);
    memory_threads.assign(threads, Thread{nothing});
    memory_words.assign(shadow_bytes / 8 + 1, nullptr);
    memory_histories.clear();
    memory_keys.clear();
    memory_fences = nothing;
    memory_random = seed * 0x9e3779b97f4a7c15u + 1;
    host_cuda::memory_order = {memory_hand_over, memory_take_over};
}

// The word of an address in an array of the launch; null elsewhere.
template <int ARRAY>
PTX History **memory_word(u64 address)
{
    const Array *array;
    if constexpr (ARRAY == ANY_ARRAY)
        array = array_of(address, 1);
    else
        array = array_count ? &arrays[ARRAY] : nullptr;
    return array ? &memory_words[(array->place + (address - array->start)) / 8] : nullptr;
}

PTX u64 mask_of(u64 address, int bytes)
{
    return (bytes == 8 ? ~u64(0) : (u64(1) << 8 * bytes) - 1) << address % 8 * 8;
}

PTX bool knows(u32 number, const Clock &known, const Message &message)
{
    return message.thread == NOBODY || message.thread == number || known.knows(message.thread, message.epoch);
}

// The index of the oldest message that a load of some bytes may give.
PTX_CALL std::size_t oldest_message(const History &history, u64 address, int bytes, u32 number, const Clock &known)
{
    const u64 mask = mask_of(address, bytes);
    std::size_t i = history.messages.size() - 1;
    while (i > 0 && !((history.messages[i].bytes & mask) && knows(number, known, history.messages[i])))
        --i;
    for (int at = 0; at < bytes; at += 4)
        if (const u32 read = known.read_at(address + at); read > history.forgotten + i)
            i = read - history.forgotten;
    return i;
}

// The bytes of a word as they were after a message, and which message wrote the last of them.
struct Found {
    u64 value;
    const Message *last;
};

PTX_CALL Found value_at(const History &history, std::size_t message, u64 mask)
{
    Found found = {0, nullptr};
    for (u64 missing = mask; missing;) {
        const Message &from = history.messages[message--];
        if (!found.last && (from.bytes & mask))
            found.last = &from;
        found.value |= from.value & from.bytes & missing;
        missing &= ~from.bytes;
    }
    return found;
}

PTX u32 same_block(u32 a, u32 b) { return a / block_threads() == b / block_threads(); }

PTX_CALL void read_clocks(Thread &thread, u32 number, const Message &message, bool acquire, Scope scope)
{
    const bool near = message.thread == NOBODY || same_block(message.thread, number);
    if (scope == Scope::GPU || near) {
        join(thread.seen, message.released);
        if (acquire)
            join(thread.known, message.released);
    }
    if (near) {
        join(thread.seen_in_block, message.released_in_block);
        join(thread.seen_in_block, message.released);
        if (acquire)
            join(thread.known, message.released_in_block);
    }
}

PTX_CALL u64 value_for(const History &history, u64 address, int bytes, const Clock &known)
{
    const std::size_t newest = history.messages.size() - 1;
    const std::size_t oldest = oldest_message(history, address, bytes, this_thread(), known);
    std::size_t chosen = newest;
    if (oldest < newest)
        switch (memory_draw(4)) {
        case 0: break;
        case 1: chosen = oldest + memory_draw(u32(newest - oldest + 1)); break;
        default: chosen = oldest;
        }
    return value_at(history, chosen, mask_of(address, bytes)).value >> address % 8 * 8;
}

template <class T, int ARRAY>
PTX T load_weak(u64 address)
{
    host_cuda::may_interrupt(false);
    History **word = memory_word<ARRAY>(address);
    if (!word || !*word)
        return *reinterpret_cast<const T *>(address);
    const u64 value = value_for(**word, address, sizeof(T), *memory_threads[this_thread()].known);
    T result;
    std::memcpy(&result, &value, sizeof(T));
    return result;
}

PTX_CALL u64 strong_value(const History &history, u64 address, int bytes, bool acquire, Scope scope, bool newest_only)
{
    const u32 number = this_thread();
    Thread &thread = memory_threads[number];
    const std::size_t newest = history.messages.size() - 1;
    const std::size_t oldest = oldest_message(history, address, bytes, number, *thread.known);
    std::size_t chosen = newest;
    if (oldest < newest && !newest_only && memory_draw(2) == 0)
        chosen = oldest + memory_draw(u32(newest - oldest));
    const Found found = value_at(history, chosen, mask_of(address, bytes));
    if (found.last->strong && (scope == Scope::GPU || same_block(found.last->thread, number)))
        for (int at = 0; at < bytes; at += 4)
            if (const u32 message = history.forgotten + u32(chosen); thread.known->read_at(address + at) < message)
                changeable(thread.known).remember((address + at) / 4, message);
    read_clocks(thread, number, *found.last, acquire, scope);
    return found.value >> address % 8 * 8;
}

// A relaxed, volatile or acquire load; `newest_only` in a loop that has read an old value again and again.
template <class T, int ARRAY>
PTX T load_strong(u64 address, bool acquire, Scope scope, bool newest_only)
{
    host_cuda::may_interrupt(true);
    History **word = memory_word<ARRAY>(address);
    if (!word || !*word)
        return *reinterpret_cast<const T *>(address);
    return T(strong_value(**word, address, sizeof(T), acquire, scope, newest_only));
}

PTX_CALL History &history_of(History *&word, u64 address)
{
    if (!word) {
        memory_histories.push_back(std::make_unique<History>());
        word = memory_histories.back().get();
        // An array may begin or end inside a word: the bytes outside it stay zero, and nobody reads them.
        u64 value = 0;
        for (u64 at = address & ~u64(7), i = 0; i < 8; ++i, ++at)
            if (array_of(at, 1))
                value |= u64(*reinterpret_cast<const u8 *>(at)) << 8 * i;
        word->messages.push_back({value, ~u64(0), NOBODY, 0, false, nullptr, nullptr});
    }
    return *word;
}

PTX_CALL void append(History &history, Message message)
{
    if (history.messages.size() == KEPT) {
        Message &first = history.messages[0], &second = history.messages[1];
        second.value = (first.value & ~second.bytes) | (second.value & second.bytes);
        second.bytes = ~u64(0);
        join(second.released, first.released);
        join(second.released_in_block, first.released_in_block);
        second.thread = NOBODY;
        second.strong = false;
        history.messages.erase(history.messages.begin());
        ++history.forgotten;
    }
    history.messages.push_back(std::move(message));
}

template <class T>
PTX u64 placed(u64 address, T value)
{
    u64 bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    return bits << address % 8 * 8;
}

template <class T, int ARRAY>
PTX_CALL void store_weak(u64 address, T value)
{
    host_cuda::may_interrupt(false);
    if (History **word = memory_word<ARRAY>(address)) {
        const u32 number = this_thread();
        append(history_of(*word, address), {placed(address, value), mask_of(address, sizeof(T)), number,
                                            memory_threads[number].epoch, false, nullptr, nullptr});
    }
    *reinterpret_cast<T *>(address) = value;
}

// The clocks that a strong write carries: those of the latest release fence, or all that the thread knows.
PTX_CALL Message strong_message(u64 value, u64 mask, bool release_it, Scope scope)
{
    const u32 number = this_thread();
    Thread &thread = memory_threads[number];
    Message message = {value, mask, number, thread.epoch, true, thread.released, thread.released_in_block};
    if (release_it)
        (scope == Scope::GPU ? message.released : message.released_in_block) = release(thread, number);
    return message;
}

// A relaxed, volatile or release store.
template <class T, int ARRAY>
PTX_CALL void store_strong(u64 address, T value, bool release_it, Scope scope)
{
    host_cuda::may_interrupt(true);
    if (History **word = memory_word<ARRAY>(address))
        append(history_of(*word, address),
               strong_message(placed(address, value), mask_of(address, sizeof(T)), release_it, scope));
    *reinterpret_cast<T *>(address) = value;
}

// An atomic reads the newest value, and hands on the clocks of the message that it replaces.
template <class T, int ARRAY, class Operation>
PTX_CALL T atomic_at(u64 address, Operation operation, bool acquire, bool release_it, Scope scope)
{
    host_cuda::may_interrupt(true);
    T &target = *reinterpret_cast<T *>(address);
    const T before = target, after = operation(before);
    if (History **word = memory_word<ARRAY>(address)) {
        History &history = history_of(*word, address);
        const u64 mask = mask_of(address, sizeof(T));
        const u32 number = this_thread();
        Thread &thread = memory_threads[number];
        const Message replaced = *value_at(history, history.messages.size() - 1, mask).last;
        read_clocks(thread, number, replaced, acquire, scope);
        Message message = strong_message(placed(address, after), mask, release_it, scope);
        join(message.released, replaced.released);
        if (replaced.thread != NOBODY && same_block(replaced.thread, number))
            join(message.released_in_block, replaced.released_in_block);
        append(history, std::move(message));
    }
    target = after;
    return before;
}

PTX_CALL void memory_fence(bool sequential, Scope scope)
{
    host_cuda::may_interrupt(true);
    const u32 number = this_thread();
    Thread &thread = memory_threads[number];
    join(thread.known, thread.seen_in_block);
    if (scope == Scope::BLOCK) {
        thread.released_in_block = release(thread, number);
        return;
    }
    join(thread.known, thread.seen);
    if (sequential)
        join(thread.known, memory_fences);
    thread.released = release(thread, number);
    if (sequential)
        join(memory_fences, thread.released);
}

// An asynchronous copy reads at any time between its start and its wait: what a load at its wait may give to a thread
// that knows no more than at the start.
PTX_CALL void copy_started()
{
    Thread &thread = memory_threads[this_thread()];
    thread.copies.push_back(thread.known);
}

PTX_CALL void copy_bytes(void *target, u64 address, int bytes)
{
    Thread &thread = memory_threads[this_thread()];
    const Known known = thread.copies[thread.copies_finished++];
    if (thread.copies_finished == thread.copies.size()) {
        thread.copies.clear();
        thread.copies_finished = 0;
    }
    for (int at = 0; at < bytes; at += 4) {  // words of 4 bytes: the copy may be torn
        History **word = memory_word<ANY_ARRAY>(address + at);
        const u64 value = word && *word ? value_for(**word, address + at, 4, *known)
                                        : *reinterpret_cast<const u32 *>(address + at);
        std::memcpy(static_cast<u8 *>(target) + at, &value, 4);
    }
}
