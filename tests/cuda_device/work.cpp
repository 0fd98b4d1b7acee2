// Streams, events, captures and graphs: in which order work is done, and when.
//
// Work is done as late as CUDA allows: when a call has to wait for it, and then only what that needs. A program that
// forgets to wait thus reads old or freed memory every time, and not once a month. With `at_once` it is done when it is
// queued, as on a GPU that is infinitely fast.
// Source: CUDA Runtime API, "Stream synchronization behavior", "Stream Management", "Event Management",
// "Graph Management"; CUDA C++ Programming Guide, "CUDA Graphs", "Stream Capture".
#include <algorithm>
#include <thread>

#include "device.h"

namespace device {

Stream null_stream;
std::set<Stream *> streams;
bool at_once = false;

namespace {

constexpr int PATIENT_QUERIES = 1000;  // of an event: then its work is done, so that a loop of queries ends

std::set<Event *> events;
std::set<Graph *> graphs, executables;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

std::uint64_t this_thread() { return std::hash<std::thread::id>()(std::this_thread::get_id()); }

bool capturing(const Stream *stream) { return stream->capture != nullptr; }

// The null stream may not be used while a stream that it is ordered with is captured.
cudaError_t implicit_capture()
{
    for (Stream *other : streams)
        if (other->blocking && capturing(other))
            return invalidate(other->capture, cudaErrorStreamCaptureImplicit);
    return cudaSuccess;
}

void forget_destroyed()
{
    for (auto it = streams.begin(); it != streams.end();) {
        Stream *stream = *it;
        if (stream->destroyed && (!stream->tail || stream->tail->done)) {
            it = streams.erase(it);
            delete stream;
        } else {
            ++it;
        }
    }
}

cudaError_t synchronize(Stream *stream)
{
    if (capturing(stream))
        return invalidate(stream->capture, cudaErrorStreamCaptureUnsupported);
    finish(stream->tail);
    if (stream == &null_stream) {
        if (cudaError_t error = implicit_capture())
            return error;
        for (Stream *other : std::set<Stream *>(streams))
            if (other->blocking)
                finish(other->tail);
    }
    return sticky;
}

std::set<int> with_ancestors(const Graph &graph, const std::vector<int> &nodes)
{
    std::set<int> found;
    std::vector<int> open = nodes;
    while (!open.empty()) {
        const int node = open.back();
        open.pop_back();
        if (found.insert(node).second)
            open.insert(open.end(), graph.nodes[node].after.begin(), graph.nodes[node].after.end());
    }
    return found;
}

void add_nodes(std::vector<int> &nodes, const std::vector<int> &more)
{
    for (int node : more)
        if (std::find(nodes.begin(), nodes.end(), node) == nodes.end())
            nodes.push_back(node);
}

}  // namespace

Stream *stream_of(void *handle)
{
    if (handle == nullptr || handle == cudaStreamLegacy)
        return &null_stream;
    if (handle == cudaStreamPerThread) {
        report("the stream of a thread (cudaStreamPerThread) is not modelled");
        return nullptr;
    }
    Stream *stream = static_cast<Stream *>(handle);
    return streams.count(stream) && !stream->destroyed ? stream : nullptr;
}

void finish(const Work &work)
{
    std::vector<Work> stack{work};
    while (!stack.empty()) {
        Work top = stack.back();
        if (!top || top->done) {
            stack.pop_back();
            continue;
        }
        bool ready = true;
        for (const Work &before : top->after)
            if (before && !before->done) {
                stack.push_back(before);
                ready = false;
            }
        if (!ready)
            continue;
        stack.pop_back();
        top->done = true;
        if (top->run && sticky == cudaSuccess) {
            trace("  does " + top->name);
            top->run();
        }
        top->after.clear();
        top->run = nullptr;
    }
}

void finish_all()
{
    finish(null_stream.tail);
    for (Stream *stream : streams)
        finish(stream->tail);
    forget_destroyed();
}

cudaError_t enqueue(Stream *stream, std::string name, std::function<void()> run, std::vector<Work> after)
{
    if (!stream)
        return cudaErrorInvalidResourceHandle;
    trace("queues " + name + (stream == &null_stream ? " on the null stream" : ""));
    if (capturing(stream)) {
        if (stream->capture->invalid)
            return cudaErrorStreamCaptureInvalidated;
        Graph &graph = stream->capture->graph;
        graph.nodes.push_back({std::move(name), std::move(run), stream->nodes});
        stream->nodes = {int(graph.nodes.size()) - 1};
        return cudaSuccess;
    }
    if (stream == &null_stream) {
        if (cudaError_t error = implicit_capture())
            return error;
        for (Stream *other : streams)
            if (other->blocking)
                after.push_back(other->tail);
    } else if (stream->blocking) {
        after.push_back(null_stream.tail);
    }
    after.push_back(stream->tail);
    stream->tail = std::make_shared<Operation>(Operation{std::move(name), std::move(run), std::move(after)});
    if (at_once)
        finish(stream->tail);
    return sticky;
}

cudaError_t invalidate(const std::shared_ptr<Capture> &capture, cudaError_t error)
{
    capture->invalid = true;
    return error;
}

cudaError_t unsafe_while_capturing(const char *call)
{
    if (thread_mode == cudaStreamCaptureModeRelaxed)
        return cudaSuccess;
    for (Stream *stream : streams) {
        if (!capturing(stream) || stream->capture->mode == cudaStreamCaptureModeRelaxed)
            continue;
        const bool everywhere = thread_mode == cudaStreamCaptureModeGlobal &&
                                stream->capture->mode == cudaStreamCaptureModeGlobal;
        if (everywhere || stream->capture->thread == this_thread()) {
            trace(std::string(call) + " is refused: a capture is active");
            return invalidate(stream->capture, cudaErrorStreamCaptureUnsupported);
        }
    }
    return cudaSuccess;
}

}  // namespace device

using namespace device;

namespace {

Event *event_of(cudaEvent_t handle)
{
    Event *event = reinterpret_cast<Event *>(handle);
    return events.count(event) ? event : nullptr;
}

// Joins `nodes` of a capture to what the next node of a stream comes after; the stream becomes part of the capture.
cudaError_t wait_in_capture(Stream *stream, const std::shared_ptr<Capture> &capture, const std::vector<int> &nodes)
{
    if (stream == &null_stream)
        return invalidate(capture, cudaErrorStreamCaptureImplicit);
    if (capturing(stream) && stream->capture != capture) {
        stream->capture->invalid = true;
        return invalidate(capture, cudaErrorStreamCaptureMerge);
    }
    if (!capturing(stream)) {
        stream->capture = capture;
        stream->nodes.clear();
        capture->streams.insert(stream);
    }
    add_nodes(stream->nodes, nodes);
    return cudaSuccess;
}

cudaError_t end_capture(Stream *stream, Graph &result)
{
    const std::shared_ptr<Capture> capture = stream->capture;
    if (!capture)
        return cudaErrorIllegalState;
    if (capture->origin != stream)
        return invalidate(capture, cudaErrorStreamCaptureUnmatched);
    if (capture->mode != cudaStreamCaptureModeRelaxed && capture->thread != this_thread())
        return invalidate(capture, cudaErrorStreamCaptureWrongThread);
    const std::set<int> joined = with_ancestors(capture->graph, stream->nodes);
    bool unjoined = false;
    for (Stream *member : capture->streams) {
        for (int node : member->nodes)
            unjoined |= !joined.count(node);
        member->capture = nullptr;
        member->nodes.clear();
    }
    if (capture->invalid)
        return cudaErrorStreamCaptureInvalidated;
    capture->invalid = true;  // for events that remain
    if (unjoined)
        return cudaErrorStreamCaptureUnjoined;
    result = std::move(capture->graph);
    return cudaSuccess;
}

}  // namespace

extern "C" {

// ---- Streams --------------------------------------------------------------------------------------------------------

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *handle, unsigned flags)
{
    RUNTIME_ENTRY;
    Stream *stream = new Stream;
    stream->blocking = !(flags & cudaStreamNonBlocking);
    streams.insert(stream);
    *handle = reinterpret_cast<cudaStream_t>(stream);
    return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t *handle) { return cudaStreamCreateWithFlags(handle, cudaStreamDefault); }

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *handle, unsigned flags, int)
{
    return cudaStreamCreateWithFlags(handle, flags);
}

// Returns at once; what is queued is done later all the same.
cudaError_t cudaStreamDestroy(cudaStream_t handle)
{
    RUNTIME_ENTRY;
    Stream *stream = stream_of(handle);
    if (!stream || stream == &null_stream)
        return returned(cudaErrorInvalidResourceHandle);
    if (capturing(stream)) {
        stream->capture->invalid = true;
        stream->capture->streams.erase(stream);
        stream->capture = nullptr;
    }
    stream->destroyed = true;
    forget_destroyed();
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle)
{
    RUNTIME_ENTRY;
    Stream *stream = stream_of(handle);
    return returned(stream ? synchronize(stream) : cudaErrorInvalidResourceHandle);
}

cudaError_t cudaStreamQuery(cudaStream_t handle)
{
    RUNTIME_ENTRY;
    Stream *stream = stream_of(handle);
    if (!stream)
        return returned(cudaErrorInvalidResourceHandle);
    if (capturing(stream))
        return returned(invalidate(stream->capture, cudaErrorStreamCaptureUnsupported));
    return !stream->tail || stream->tail->done ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned)
{
    RUNTIME_ENTRY;
    Stream *stream = stream_of(handle);
    Event *event = event_of(event_handle);
    if (!stream || !event)
        return returned(cudaErrorInvalidResourceHandle);
    if (!event->recorded)
        return cudaSuccess;
    if (event->capture) {
        if (event->capture->invalid)
            return returned(cudaErrorStreamCaptureInvalidated);
        return returned(wait_in_capture(stream, event->capture, event->nodes));
    }
    if (capturing(stream))
        return returned(invalidate(stream->capture, cudaErrorStreamCaptureIsolation));
    return returned(enqueue(stream, "wait for an event", nullptr, {event->work}));
}

cudaError_t cudaDeviceSynchronize()
{
    RUNTIME_ENTRY;
    for (Stream *stream : streams)
        if (capturing(stream))
            return returned(invalidate(stream->capture, cudaErrorStreamCaptureUnsupported));
    finish_all();
    return returned(sticky);
}

// ---- Events ---------------------------------------------------------------------------------------------------------

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *handle, unsigned flags)
{
    RUNTIME_ENTRY;
    Event *event = new Event;
    event->timing = !(flags & cudaEventDisableTiming);
    events.insert(event);
    *handle = reinterpret_cast<cudaEvent_t>(event);
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *handle) { return cudaEventCreateWithFlags(handle, cudaEventDefault); }

cudaError_t cudaEventDestroy(cudaEvent_t handle)
{
    RUNTIME_ENTRY;
    Event *event = event_of(handle);
    if (!event)
        return returned(cudaErrorInvalidResourceHandle);
    events.erase(event);
    delete event;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event_handle, cudaStream_t handle)
{
    RUNTIME_ENTRY;
    Stream *stream = stream_of(handle);
    Event *event = event_of(event_handle);
    if (!stream || !event)
        return returned(cudaErrorInvalidResourceHandle);
    event->capture = stream->capture;
    event->recorded = true;
    if (capturing(stream)) {
        event->nodes = stream->nodes;
        return cudaSuccess;
    }
    event->queries = 0;
    auto at = event->at = std::make_shared<std::chrono::steady_clock::time_point>();
    const cudaError_t error = enqueue(stream, "an event", [at] { *at = std::chrono::steady_clock::now(); });
    event->work = stream->tail;
    return returned(error);
}

cudaError_t cudaEventQuery(cudaEvent_t handle)
{
    RUNTIME_ENTRY;
    Event *event = event_of(handle);
    if (!event)
        return returned(cudaErrorInvalidResourceHandle);
    if (event->capture)
        return returned(invalidate(event->capture, cudaErrorCapturedEvent));
    if (cudaError_t error = unsafe_while_capturing("cudaEventQuery"))
        return returned(error);
    if (event->recorded && !event->work->done && ++event->queries >= PATIENT_QUERIES)
        finish(event->work);
    return !event->recorded || event->work->done ? sticky : cudaErrorNotReady;
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle)
{
    RUNTIME_ENTRY;
    Event *event = event_of(handle);
    if (!event)
        return returned(cudaErrorInvalidResourceHandle);
    if (event->capture)
        return returned(invalidate(event->capture, cudaErrorCapturedEvent));
    if (cudaError_t error = unsafe_while_capturing("cudaEventSynchronize"))
        return returned(error);
    if (event->recorded)
        finish(event->work);
    return returned(sticky);
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start_handle, cudaEvent_t end_handle)
{
    RUNTIME_ENTRY;
    Event *start = event_of(start_handle), *end = event_of(end_handle);
    for (Event *event : {start, end})
        if (!event || !event->timing || !event->recorded || event->capture)
            return returned(cudaErrorInvalidResourceHandle);
    if (!start->work->done || !end->work->done)
        return cudaErrorNotReady;
    *milliseconds = std::chrono::duration<float, std::milli>(*end->at - *start->at).count();
    return cudaSuccess;
}

// ---- Captures and graphs --------------------------------------------------------------------------------------------

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode)
{
    RUNTIME_ENTRY;
    Stream *stream = stream_of(handle);
    if (!stream)
        return returned(cudaErrorInvalidResourceHandle);
    if (stream == &null_stream)
        return returned(cudaErrorStreamCaptureUnsupported);
    if (capturing(stream))
        return returned(invalidate(stream->capture, cudaErrorIllegalState));
    stream->capture = std::make_shared<Capture>();
    stream->capture->mode = mode;
    stream->capture->thread = this_thread();
    stream->capture->origin = stream;
    stream->capture->streams = {stream};
    stream->nodes.clear();
    trace("capture begins");
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t *graph_handle)
{
    RUNTIME_ENTRY;
    *graph_handle = nullptr;
    Stream *stream = stream_of(handle);
    if (!stream)
        return returned(cudaErrorInvalidResourceHandle);
    Graph graph;
    if (cudaError_t error = end_capture(stream, graph))
        return returned(error);
    trace("capture ends, with " + std::to_string(graph.nodes.size()) + " nodes");
    Graph *result = new Graph(std::move(graph));
    graphs.insert(result);
    *graph_handle = reinterpret_cast<cudaGraph_t>(result);
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus *status)
{
    RUNTIME_ENTRY;
    Stream *stream = stream_of(handle);
    if (!stream)
        return returned(cudaErrorInvalidResourceHandle);
    if (stream == &null_stream)
        if (cudaError_t error = implicit_capture())
            return returned(error);
    *status = !capturing(stream) ? cudaStreamCaptureStatusNone
              : stream->capture->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *mode)
{
    RUNTIME_ENTRY;
    std::swap(thread_mode, *mode);
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *handle, cudaGraph_t graph_handle, unsigned long long)
{
    RUNTIME_ENTRY;
    Graph *graph = reinterpret_cast<Graph *>(graph_handle);
    if (!graphs.count(graph))
        return returned(cudaErrorInvalidResourceHandle);
    Graph *executable = new Graph(*graph);
    executables.insert(executable);
    *handle = reinterpret_cast<cudaGraphExec_t>(executable);
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t handle)
{
    RUNTIME_ENTRY;
    Graph *graph = reinterpret_cast<Graph *>(handle);
    if (!graphs.erase(graph))
        return returned(cudaErrorInvalidResourceHandle);
    delete graph;
    return cudaSuccess;
}

// A launch that has not ended goes on.
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t handle)
{
    RUNTIME_ENTRY;
    Graph *graph = reinterpret_cast<Graph *>(handle);
    if (!executables.erase(graph))
        return returned(cudaErrorInvalidResourceHandle);
    delete graph;
    return cudaSuccess;
}

cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }

cudaError_t cudaGraphLaunch(cudaGraphExec_t handle, cudaStream_t stream_handle)
{
    RUNTIME_ENTRY;
    Graph *graph = reinterpret_cast<Graph *>(handle);
    Stream *stream = stream_of(stream_handle);
    if (!executables.count(graph) || !stream)
        return returned(cudaErrorInvalidResourceHandle);
    if (capturing(stream)) {
        report("a graph launched inside a capture is not modelled");
        return returned(invalidate(stream->capture, cudaErrorNotSupported));
    }
    if (cudaError_t error = enqueue(stream, "the start of a graph", nullptr, {graph->last_launch}))
        return returned(error);
    std::vector<Work> works;
    for (const Node &node : graph->nodes) {
        std::vector<Work> after{stream->tail};
        for (int before : node.after)
            after.push_back(works[before]);
        works.push_back(std::make_shared<Operation>(Operation{"in a graph: " + node.name, node.run, std::move(after)}));
    }
    const cudaError_t error = enqueue(stream, "the end of a graph", nullptr, works);
    graph->last_launch = stream->tail;
    return returned(error);
}

}  // extern "C"
