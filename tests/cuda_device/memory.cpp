// Memory of the device and pinned memory of the host, copies and fills, errors and reports.
//
// Every allocation ends at a page that nothing may touch, and a freed one becomes such pages: the first touch stops the
// process, with the name of the kernel. Fresh memory holds 0xff: NaN in every float format, -1 as an integer.
// Source: CUDA Runtime API, "API synchronization behavior", "Memory Management".
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>

#include <sys/mman.h>
#include <unistd.h>

#include "device.h"

namespace device {

std::recursive_mutex mutex;
cudaError_t sticky = cudaSuccess;
thread_local cudaError_t last_error = cudaSuccess;
Settings settings;

namespace {

constexpr std::size_t PAGE = 4096, ALIGNMENT = 512, FREED_KEPT = 8192;
constexpr int POISON = 0xff;

struct Allocation {
    std::uintptr_t start;
    std::size_t bytes;
    char *mapping;
    std::size_t mapped;
    Place place;
};

std::map<std::uintptr_t, Allocation> allocations, freed;  // by start
std::vector<std::uintptr_t> freed_order;
std::map<std::uint64_t, std::uint64_t> arrays;  // start -> bytes of what CuPy's pool handed out last, there
std::uint64_t used = 0;
std::vector<std::string> reports;
bool tracing = false;
std::string doing;  // for the signal handler: the copy, fill or kernel that runs
struct sigaction previous_handler;

const Allocation *found(const std::map<std::uintptr_t, Allocation> &map, const void *address)
{
    const std::uintptr_t at = reinterpret_cast<std::uintptr_t>(address);
    auto it = map.upper_bound(at);
    if (it == map.begin())
        return nullptr;
    --it;
    return at < it->first + it->second.bytes ? &it->second : nullptr;
}

std::string hex(const void *address)
{
    char text[32];
    std::snprintf(text, sizeof text, "%p", address);
    return text;
}

void on_fault(int number, siginfo_t *info, void *context)
{
    const std::uintptr_t at = reinterpret_cast<std::uintptr_t>(info->si_addr);
    const char *what = "";
    for (auto *map : {&allocations, &freed})
        for (auto &[start, allocation] : *map)
            if (at >= std::uintptr_t(allocation.mapping) && at < std::uintptr_t(allocation.mapping) + allocation.mapped)
                what = map == &freed ? "freed memory" : "memory beyond an allocation";
    if (*what || !doing.empty())
        std::fprintf(stderr, "cuda_device: %s touches %s at %p\n", doing.empty() ? "the host" : doing.c_str(),
                     *what ? what : "memory that is not there", info->si_addr);
    sigaction(SIGSEGV, &previous_handler, nullptr);  // the instruction is tried again, and ends the process
    (void)number, (void)context;
}

void forget_arrays(std::uint64_t start, std::uint64_t bytes)
{
    auto first = arrays.upper_bound(start);
    if (first != arrays.begin() && start - std::prev(first)->first < std::prev(first)->second)
        --first;
    arrays.erase(first, arrays.lower_bound(start + bytes));
}

void watch_faults()
{
    static bool watching = false;
    if (watching)
        return;
    watching = true;
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &previous_handler);
}

cudaError_t allocate(void **address, std::size_t bytes, Place place)
{
    watch_faults();
    *address = nullptr;
    if (bytes == 0)
        return cudaSuccess;
    const std::size_t kept = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    if (place == Place::DEVICE && used + kept > settings.memory_bytes)
        return cudaErrorMemoryAllocation;
    const std::size_t pages = (kept + PAGE - 1) / PAGE * PAGE, mapped = pages + PAGE;
    void *mapping = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED)
        return cudaErrorMemoryAllocation;
    char *start = static_cast<char *>(mapping) + pages - kept;
    mprotect(static_cast<char *>(mapping) + pages, PAGE, PROT_NONE);
    std::memset(start, POISON, kept);
    allocations[std::uintptr_t(start)] = {std::uintptr_t(start), kept, static_cast<char *>(mapping), mapped, place};
    used += place == Place::DEVICE ? kept : 0;
    *address = start;
    return cudaSuccess;
}

cudaError_t release(void *address, Place place)
{
    if (!address)
        return cudaSuccess;
    auto it = allocations.find(std::uintptr_t(address));
    if (it == allocations.end() || it->second.place != place)
        return cudaErrorInvalidValue;
    finish_all();  // as cudaFree does
    Allocation allocation = it->second;
    allocations.erase(it);
    forget_arrays(allocation.start, allocation.bytes);
    used -= place == Place::DEVICE ? allocation.bytes : 0;
    mmap(allocation.mapping, allocation.mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1,
         0);
    freed[allocation.start] = allocation;
    freed_order.push_back(allocation.start);
    if (freed_order.size() > FREED_KEPT) {
        const Allocation &oldest = freed[freed_order.front()];
        munmap(oldest.mapping, oldest.mapped);
        freed.erase(freed_order.front());
        freed_order.erase(freed_order.begin());
    }
    return sticky;
}

// What one end of a copy of a certain kind may be.
bool fits(const void *address, std::size_t bytes, bool on_device)
{
    return !on_device || fault_in(address, bytes, true).empty();
}

void run_copy(void *to, const void *from, std::size_t bytes)
{
    for (const void *end : {static_cast<const void *>(to), from}) {
        const std::string fault = place_of(end) == Place::NOWHERE ? "" : fault_in(end, bytes, false);
        if (!fault.empty())
            return fail(cudaErrorIllegalAddress, "a copy touches " + fault);
    }
    doing = "a copy of " + std::to_string(bytes) + " bytes";
    std::memmove(to, from, bytes);
    doing.clear();
}

cudaError_t copy(void *to, const void *from, std::size_t bytes, cudaMemcpyKind kind, Stream *stream)
{
    if (!stream)
        return cudaErrorInvalidResourceHandle;
    const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (!fits(to, bytes, to_device) || !fits(from, bytes, from_device)) {
        report("a copy of " + std::to_string(bytes) + " bytes has an end that is no memory of the device");
        return cudaErrorInvalidValue;
    }
    const bool pageable = place_of(to) == Place::NOWHERE || place_of(from) == Place::NOWHERE;
    if (pageable && stream->capture) {
        report("a copy of memory that is not pinned, inside a capture, is not modelled");
        return invalidate(stream->capture, cudaErrorStreamCaptureUnsupported);
    }
    const char *name = pageable ? "a pageable copy of " : "a copy of ";
    return enqueue(stream, name + std::to_string(bytes) + " bytes", [=] { run_copy(to, from, bytes); });
}

cudaError_t fill(void *address, int value, std::size_t bytes, Stream *stream)
{
    if (!fault_in(address, bytes, true).empty()) {
        report("a fill of " + std::to_string(bytes) + " bytes touches " + fault_in(address, bytes, true));
        return cudaErrorInvalidValue;
    }
    return enqueue(stream, "a fill of " + std::to_string(bytes) + " bytes", [=] {
        const std::string fault = fault_in(address, bytes, true);
        if (!fault.empty())
            return fail(cudaErrorIllegalAddress, "a fill touches " + fault);
        std::memset(address, value, bytes);
    });
}

}  // namespace

Place place_of(const void *address)
{
    if (const Allocation *allocation = found(allocations, address))
        return allocation->place;
    return found(freed, address) ? Place::FREED : Place::NOWHERE;
}

Range array_at(std::uint64_t address)
{
    auto array = arrays.upper_bound(address);
    if (array != arrays.begin() && address - std::prev(array)->first < std::prev(array)->second)
        return {std::prev(array)->first, std::prev(array)->second};
    const Allocation *allocation = found(allocations, reinterpret_cast<const void *>(address));
    return allocation ? Range{allocation->start, allocation->bytes} : Range{};
}

std::string fault_in(const void *address, std::size_t bytes, bool device_only)
{
    if (bytes == 0)
        return "";
    const Allocation *allocation = found(allocations, address);
    if (!allocation)
        return (found(freed, address) ? "freed memory at " : "memory that was never allocated at ") + hex(address);
    if (device_only && allocation->place != Place::DEVICE)
        return "memory of the host at " + hex(address);
    if (std::uintptr_t(address) + bytes > allocation->start + allocation->bytes)
        return "memory beyond an allocation, from " + hex(address) + " on " + std::to_string(bytes) + " bytes";
    return "";
}

cudaError_t returned(cudaError_t error)
{
    if (error != cudaSuccess)
        last_error = error;
    return error;
}

void report(const std::string &text)
{
    std::fprintf(stderr, "cuda_device: %s\n", text.c_str());
    reports.push_back(text);
}

void fail(cudaError_t error, const std::string &text)
{
    report(text);
    sticky = error;
}

void trace(const std::string &text)
{
    if (tracing)
        std::fprintf(stderr, "cuda_device: %s\n", text.c_str());
}

void now_doing(const std::string &text) { doing = text; }

}  // namespace device

using namespace device;

extern "C" {

// ---- For the tests --------------------------------------------------------------------------------------------------

void cuda_device_set(const char *name, int capability, int multiprocessors, int shared_bytes,
                     std::uint64_t memory_bytes, int do_at_once, int print_trace)
{
    std::lock_guard<std::recursive_mutex> lock(mutex);
    std::snprintf(settings.name, sizeof settings.name, "%s", name);
    settings.capability = capability;
    if (!settings.first_capability)
        settings.first_capability = capability;
    settings.multiprocessors = multiprocessors;
    settings.shared_bytes = shared_bytes;
    settings.memory_bytes = memory_bytes;
    at_once = do_at_once;
    tracing = print_trace;
}

void cuda_device_work_at_once(int do_at_once)
{
    std::lock_guard<std::recursive_mutex> lock(mutex);
    finish_all();
    at_once = do_at_once;
}

void cuda_device_limit_memory(std::uint64_t bytes)
{
    std::lock_guard<std::recursive_mutex> lock(mutex);
    settings.memory_bytes = bytes;
}

std::uint64_t cuda_device_used_memory()
{
    std::lock_guard<std::recursive_mutex> lock(mutex);
    return used;
}

// CuPy's pool has handed out these bytes of an allocation, for an array.
void cuda_device_array(std::uint64_t start, std::uint64_t bytes)
{
    std::lock_guard<std::recursive_mutex> lock(mutex);
    forget_arrays(start, bytes);
    arrays[start] = bytes;
}

// As a new process would find the device, but for memory and modules. On a GPU only a new process is rid of an error.
void cuda_device_reset()
{
    std::lock_guard<std::recursive_mutex> lock(mutex);
    for (Stream *stream : streams)
        if (stream->capture) {
            stream->capture->invalid = true;
            stream->capture = nullptr;
        }
    finish_all();  // after an error, this does nothing of what is queued
    sticky = last_error = cudaSuccess;
}

int cuda_device_failed() { return sticky; }

// The reports since the call before, a line each; valid until the next call.
const char *cuda_device_reports()
{
    std::lock_guard<std::recursive_mutex> lock(mutex);
    static std::string text;
    text.clear();
    for (const std::string &line : reports)
        text += line + "\n";
    reports.clear();
    return text.c_str();
}

void cuda_device_report(const char *text)
{
    std::lock_guard<std::recursive_mutex> lock(mutex);
    report(text);
}

// What stands in the place of every runtime function that is not modelled.
cudaError_t cuda_device_not_modelled(const char *name)
{
    std::lock_guard<std::recursive_mutex> lock(mutex);
    report(std::string(name) + " is not modelled");
    return returned(cudaErrorNotSupported);
}

// ---- Runtime API: memory --------------------------------------------------------------------------------------------

cudaError_t cudaMalloc(void **address, std::size_t bytes)
{
    RUNTIME_ENTRY;
    trace("allocates " + std::to_string(bytes) + " bytes");
    if (cudaError_t error = unsafe_while_capturing("cudaMalloc"))
        return returned(error);
    return returned(allocate(address, bytes, Place::DEVICE));
}

cudaError_t cudaHostAlloc(void **address, std::size_t bytes, unsigned)
{
    RUNTIME_ENTRY;
    trace("pins " + std::to_string(bytes) + " bytes");
    if (cudaError_t error = unsafe_while_capturing("cudaHostAlloc"))
        return returned(error);
    return returned(allocate(address, bytes, Place::PINNED));
}

cudaError_t cudaMallocHost(void **address, std::size_t bytes) { return cudaHostAlloc(address, bytes, 0); }

cudaError_t cudaFree(void *address)
{
    RUNTIME_ENTRY;
    if (cudaError_t error = unsafe_while_capturing("cudaFree"))
        return returned(error);
    return returned(release(address, Place::DEVICE));
}

cudaError_t cudaFreeHost(void *address)
{
    RUNTIME_ENTRY;
    if (cudaError_t error = unsafe_while_capturing("cudaFreeHost"))
        return returned(error);
    return returned(release(address, Place::PINNED));
}

cudaError_t cudaMemGetInfo(std::size_t *free, std::size_t *total)
{
    RUNTIME_ENTRY;
    *total = settings.memory_bytes;
    *free = used < settings.memory_bytes ? settings.memory_bytes - used : 0;
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *address)
{
    RUNTIME_ENTRY;
    const Place place = place_of(address);
    *attributes = {};
    attributes->type = place == Place::DEVICE ? cudaMemoryTypeDevice
                       : place == Place::PINNED ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    attributes->devicePointer = place == Place::NOWHERE ? nullptr : const_cast<void *>(address);
    attributes->hostPointer = place == Place::DEVICE ? nullptr : const_cast<void *>(address);
    return cudaSuccess;
}

// Neither pinned nor pageable memory of the host may be touched before the copy is known to have ended: with pageable
// memory the function "might be synchronous".
cudaError_t cudaMemcpyAsync(void *to, const void *from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t stream)
{
    RUNTIME_ENTRY;
    return returned(copy(to, from, bytes, kind, stream_of(stream)));
}

// On the null stream. Waits for the copy, except from the device to the device.
cudaError_t cudaMemcpy(void *to, const void *from, std::size_t bytes, cudaMemcpyKind kind)
{
    RUNTIME_ENTRY;
    if (cudaError_t error = copy(to, from, bytes, kind, &null_stream))
        return returned(error);
    if (place_of(to) != Place::DEVICE || place_of(from) != Place::DEVICE)
        finish(null_stream.tail);
    return returned(sticky);
}

cudaError_t cudaMemsetAsync(void *address, int value, std::size_t bytes, cudaStream_t stream)
{
    RUNTIME_ENTRY;
    return returned(fill(address, value, bytes, stream_of(stream)));
}

// On the null stream; asynchronous for memory of the device.
cudaError_t cudaMemset(void *address, int value, std::size_t bytes)
{
    RUNTIME_ENTRY;
    return returned(fill(address, value, bytes, &null_stream));
}

// ---- Runtime API: errors --------------------------------------------------------------------------------------------

cudaError_t cudaPeekAtLastError() { return sticky != cudaSuccess ? sticky : last_error; }

cudaError_t cudaGetLastError()
{
    const cudaError_t error = cudaPeekAtLastError();
    last_error = cudaSuccess;
    return error;
}

}  // extern "C"
