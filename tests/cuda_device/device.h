// The state of the device: operations, streams, captures, memory, errors. README.md says what is modelled.
//
// One lock guards all of it. Nothing that holds the lock calls Python: a thread that holds Python's own lock may be
// waiting for this one.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include <cuda.h>
#include <cuda_runtime_api.h>

namespace device {

// ---- Work -----------------------------------------------------------------------------------------------------------

// One piece of work, done once all that it comes after is done, and not before somebody has to wait for it.
struct Operation {
    std::string name;
    std::function<void()> run;  // empty: only an order
    std::vector<std::shared_ptr<Operation>> after;
    bool done = false;
};
using Work = std::shared_ptr<Operation>;

// Work recorded by a capture: each node comes after some of the nodes before it.
struct Node {
    std::string name;
    std::function<void()> run;
    std::vector<int> after;
};

struct Graph {
    std::vector<Node> nodes;
    Work last_launch;  // of an executable graph: its launches do not overlap
};

struct Stream;

struct Capture {
    cudaStreamCaptureMode mode;
    std::uint64_t thread;  // that began it
    Stream *origin;
    bool invalid = false;
    Graph graph;
    std::set<Stream *> streams;  // the origin, and those that joined by waiting for an event of the capture
};

struct Stream {
    bool blocking = true;  // ordered with the null stream
    bool destroyed = false;
    Work tail;
    std::shared_ptr<Capture> capture;  // null: not captured
    std::vector<int> nodes;            // of the capture: what the next node comes after
};

struct Event {
    bool timing = true, recorded = false;
    Work work;  // what was in the stream when it was recorded last
    std::shared_ptr<std::chrono::steady_clock::time_point> at;
    std::shared_ptr<Capture> capture;  // recorded in a capture
    std::vector<int> nodes;
    int queries = 0;  // in vain, since the last record
};

extern Stream null_stream;
extern std::set<Stream *> streams;  // all others
extern bool at_once;                // do work when it is queued, not when somebody waits for it

Stream *stream_of(void *handle);  // null where there is no such stream
void finish(const Work &work);    // does it, and first all that it comes after
void finish_all();
cudaError_t enqueue(Stream *stream, std::string name, std::function<void()> run, std::vector<Work> after = {});
cudaError_t unsafe_while_capturing(const char *call);   // an error where this thread may not make such a call now
cudaError_t invalidate(const std::shared_ptr<Capture> &capture, cudaError_t error);

// ---- Memory ---------------------------------------------------------------------------------------------------------

enum class Place { NOWHERE, DEVICE, PINNED, FREED };

struct Range {
    std::uint64_t start, bytes;
};

Place place_of(const void *address);
Range array_at(std::uint64_t address);  // or the allocation, where no array is known; empty where there is neither
std::string fault_in(const void *address, std::size_t bytes, bool device_only);  // "" if a kernel or copy may touch it

// ---- Errors, reports ------------------------------------------------------------------------------------------------

extern std::recursive_mutex mutex;
extern cudaError_t sticky;  // what every call returns once a kernel has failed
extern thread_local cudaError_t last_error;

cudaError_t returned(cudaError_t error);      // remembers it for cudaGetLastError
void report(const std::string &text);         // to stderr, and for the tests
void fail(cudaError_t error, const std::string &text);  // what a kernel or copy that fails leaves behind
void trace(const std::string &text);
void now_doing(const std::string &text);      // named if memory is touched that nobody may touch

struct Settings {
    char name[256];
    int capability, multiprocessors, shared_bytes;
    int first_capability;  // for which CuPy compiles, whatever the device becomes later
    std::uint64_t memory_bytes;
};
extern Settings settings;

}  // namespace device

// The first line of each function of an API.
#define RUNTIME_ENTRY                                          \
    std::lock_guard<std::recursive_mutex> lock(device::mutex); \
    if (device::sticky != cudaSuccess)                         \
        return device::sticky
#define DRIVER_ENTRY                                           \
    std::lock_guard<std::recursive_mutex> lock(device::mutex); \
    if (device::sticky != cudaSuccess)                         \
        return CUresult(device::sticky)
