// The device's properties, modules, attributes and occupancy of kernels, launches.
//
// What the driver reads from a cubin is read from it here too (elf.py): names, registers, static shared memory, launch
// bounds, sizes of parameters. A launch copies its parameters by these sizes, as the driver does, whatever the caller
// passed; a build for the host then runs it, of the kernel's source or of its PTX.
// Source: CUDA Driver API, "Module Management", "Execution Control", "Occupancy"; CUDA C++ Programming Guide, "Compute
// Capabilities".
#include <cstdio>
#include <cstring>
#include <sstream>

#include <cuda_occupancy.h>
#include <dlfcn.h>

#include "device.h"
#include "launch.h"

using namespace device;

namespace {

constexpr int DRIVER_VERSION = CUDA_VERSION / 1000 * 1000;  // of the headers that CuPy's packages bring
constexpr int SHARED_WITHOUT_ASKING = 48 * 1024, MAX_THREADS = 1024, REGISTERS = 65536;

struct Parameter {
    int bytes;
    bool pointer;
};

using Array = std::uint64_t[3];  // as ptx_arrays of tests/host_ptx/memory.h takes it

struct Function {
    std::string name;
    int registers = 0, shared_bytes = 0, max_threads = MAX_THREADS, max_dynamic = 0;
    std::vector<Parameter> parameters;
    bool loaded = true;
    const char *(*launch)(LaunchRequest *) = nullptr;
    void (*arrays)(int, const Array *, std::uint64_t) = nullptr;   // ptx_arrays, which a build of PTX has
    const char *(*wrong_counter)(std::uint64_t blocks) = nullptr;  // and ptx_wrong_counter
};

using Module = std::map<std::string, std::shared_ptr<Function>>;

std::map<Function *, std::shared_ptr<Function>> functions;
std::set<Module *> modules;
const char *(*describe)(const void *image) = nullptr;
std::map<std::string, int> failing;  // kernel -> launches left until one fails
std::map<std::string, std::uint64_t> launches[2];  // kernel -> launches that ran to their end; [1]: from PTX

// Threads and blocks that a multiprocessor holds. Table "Technical Specifications per Compute Capability".
struct Limits {
    int threads, blocks;
};

Limits limits_of(int capability)
{
    switch (capability) {
    case 75: return {1024, 16};
    case 80: return {2048, 32};
    case 86: return {1536, 16};
    case 89: return {1536, 24};
    case 120: return {1536, 24};
    default: return {2048, 32};  // 90
    }
}

int reserved_shared_bytes() { return settings.capability >= 80 ? 1024 : 0; }

cudaOccDeviceProp occupancy_properties()
{
    cudaOccDeviceProp properties;
    properties.computeMajor = settings.capability / 10;
    properties.computeMinor = settings.capability % 10;
    properties.maxThreadsPerBlock = MAX_THREADS;
    properties.maxThreadsPerMultiprocessor = limits_of(settings.capability).threads;
    properties.regsPerBlock = properties.regsPerMultiprocessor = REGISTERS;
    properties.warpSize = 32;
    properties.sharedMemPerBlock = SHARED_WITHOUT_ASKING;
    properties.sharedMemPerMultiprocessor = settings.shared_bytes + reserved_shared_bytes();
    properties.numSms = settings.multiprocessors;
    properties.sharedMemPerBlockOptin = settings.shared_bytes;
    properties.reservedSharedMemPerBlock = reserved_shared_bytes();
    return properties;
}

int blocks_per_multiprocessor(const Function &function, int threads, std::size_t dynamic_bytes)
{
    const cudaOccDeviceProp properties = occupancy_properties();
    cudaOccFuncAttributes attributes;
    attributes.maxThreadsPerBlock = function.max_threads;
    attributes.numRegs = function.registers;
    attributes.sharedSizeBytes = function.shared_bytes;
    attributes.partitionedGCConfig = PARTITIONED_GC_OFF;
    attributes.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    attributes.maxDynamicSharedSizeBytes = function.max_dynamic;
    attributes.numBlockBarriers = 1;
    const cudaOccDeviceState state;
    cudaOccResult result;
    if (int(dynamic_bytes) > function.max_dynamic ||
        cudaOccMaxActiveBlocksPerMultiprocessor(&result, &properties, &attributes, &state, threads, dynamic_bytes))
        return 0;
    return result.activeBlocksPerMultiprocessor;
}

Function *function_of(CUfunction handle)
{
    Function *function = reinterpret_cast<Function *>(handle);
    auto it = functions.find(function);
    return it != functions.end() && function->loaded ? function : nullptr;
}

// One line of describe(): NAME REGISTERS SHARED MAX_THREADS, then a word per parameter: its bytes, `*` for a pointer.
std::shared_ptr<Function> described(const std::string &line)
{
    auto function = std::make_shared<Function>();
    std::istringstream words(line);
    words >> function->name >> function->registers >> function->shared_bytes >> function->max_threads;
    for (std::string word; words >> word;)
        function->parameters.push_back({std::stoi(word), word.back() == '*'});
    function->max_dynamic = std::max(0, SHARED_WITHOUT_ASKING - function->shared_bytes);
    return function;
}

bool fails_now(const std::string &name)
{
    for (const std::string &key : {name, std::string("any")}) {
        auto it = failing.find(key);
        if (it != failing.end() && it->second > 0 && --it->second == 0)
            return true;
    }
    return false;
}

struct Shape {
    unsigned grid[3], block[3], shared_bytes;
    bool cooperative;
    unsigned threads() const { return block[0] * block[1] * block[2]; }
    unsigned blocks() const { return grid[0] * grid[1] * grid[2]; }
};

// The array that each pointer lies in now; empty for numbers.
std::vector<Range> arrays_of(const Function &function, const std::vector<std::uint64_t> &values)
{
    std::vector<Range> ranges(values.size());
    for (std::size_t i = 0; i < values.size(); ++i)
        if (function.parameters[i].pointer)
            ranges[i] = array_at(values[i]);
    return ranges;
}

// Tells a build of PTX of the arrays, which bound the accesses that come from the pointers to them.
void describe_arrays(const Function &function, const std::vector<Range> &ranges)
{
    std::unique_ptr<Array[]> described(new Array[ranges.size()]{});
    std::map<std::uint64_t, std::uint64_t> shadows;  // start of an array -> start of its marks
    std::uint64_t shadow_bytes = 0;
    for (std::size_t i = 0; i < ranges.size(); ++i) {
        const auto [shadow, is_new] = shadows.try_emplace(ranges[i].start, shadow_bytes);
        shadow_bytes += is_new ? (ranges[i].bytes + 15) / 16 * 16 : 0;
        described[i][0] = ranges[i].start;
        described[i][1] = ranges[i].bytes;
        described[i][2] = shadow->second;
    }
    function.arrays(int(ranges.size()), described.get(), shadow_bytes);
}

void run(const Function &function, const Shape &shape, const std::vector<std::uint64_t> &values,
         const std::vector<Range> &ranges)
{
    if (!function.loaded)
        return fail(cudaErrorInvalidResourceHandle, function.name + " is launched after its module was unloaded");
    if (fails_now(function.name))
        return fail(cudaErrorLaunchFailure, function.name + " fails, as a test asked for");
    for (std::size_t i = 0; i < values.size(); ++i) {
        void *address = reinterpret_cast<void *>(values[i]);
        const std::string fault = function.parameters[i].pointer && address ? fault_in(address, 1, false) : "";
        if (!fault.empty())
            return fail(cudaErrorIllegalAddress, function.name + ": argument " + std::to_string(i) + " is " + fault);
    }
    std::vector<void *> arguments;
    for (const std::uint64_t &value : values)
        arguments.push_back(const_cast<std::uint64_t *>(&value));
    arguments.push_back(nullptr);
    LaunchRequest request{};
    request.kernel = function.name.c_str();
    std::memcpy(request.grid, shape.grid, sizeof request.grid);
    std::memcpy(request.block, shape.block, sizeof request.block);
    request.shared_bytes = shape.shared_bytes;
    request.cooperative = shape.cooperative;
    request.order = Order::ASCENDING;
    request.arguments = arguments.data();
    if (function.arrays)
        describe_arrays(function, ranges);
    now_doing(function.name);
    const char *failure = function.launch(&request);
    now_doing("");
    if (!failure && function.wrong_counter)
        failure = function.wrong_counter(shape.blocks());
    if (failure)
        fail(std::strncmp(failure, "PTX line ", 9) == 0 ? cudaErrorLaunchFailure : cudaErrorLaunchTimeout,
             function.name + ": " + failure);
    else
        ++launches[function.arrays != nullptr][function.name];
}

CUresult launch(CUfunction handle, const Shape &shape, CUstream stream_handle, void **parameters)
{
    Function *function = function_of(handle);
    Stream *stream = stream_of(stream_handle);
    if (!function || !stream)
        return CUDA_ERROR_INVALID_HANDLE;
    if (!shape.blocks() || !shape.threads() || shape.threads() > MAX_THREADS || shape.block[2] > 64 ||
        shape.grid[1] > 65535 || shape.grid[2] > 65535 || int(shape.shared_bytes) > function->max_dynamic)
        return CUDA_ERROR_INVALID_VALUE;
    const unsigned registers = (function->registers * 32 + 255) / 256 * 256 * ((shape.threads() + 31) / 32);
    if (int(shape.threads()) > function->max_threads || registers > REGISTERS)
        return CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
    if (shape.cooperative && shape.blocks() > unsigned(settings.multiprocessors) * blocks_per_multiprocessor(
            *function, shape.threads(), shape.shared_bytes))
        return CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE;
    std::vector<std::uint64_t> values(function->parameters.size());
    for (std::size_t i = 0; i < values.size(); ++i)
        std::memcpy(&values[i], parameters[i], function->parameters[i].bytes);
    std::shared_ptr<Function> kept = functions[function];
    // The arrays as they are at this call: when the work is done, the pool may have given their bytes to others.
    const std::vector<Range> ranges = arrays_of(*function, values);
    return CUresult(enqueue(stream, function->name, [=] { run(*kept, shape, values, ranges); }));
}

// Name and meaning of an error of the driver, which has the number of the runtime's.
std::pair<const char *, const char *> error_text(CUresult error)
{
    switch (error) {
    case CUDA_ERROR_INVALID_VALUE: return {"CUDA_ERROR_INVALID_VALUE", "invalid argument"};
    case CUDA_ERROR_OUT_OF_MEMORY: return {"CUDA_ERROR_OUT_OF_MEMORY", "out of memory"};
    case CUDA_ERROR_INVALID_IMAGE: return {"CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"};
    case CUDA_ERROR_NO_BINARY_FOR_GPU:
        return {"CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"};
    case CUDA_ERROR_INVALID_HANDLE: return {"CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"};
    case CUDA_ERROR_NOT_FOUND: return {"CUDA_ERROR_NOT_FOUND", "named symbol not found"};
    case CUDA_ERROR_ILLEGAL_ADDRESS:
        return {"CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"};
    case CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES:
        return {"CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"};
    case CUDA_ERROR_LAUNCH_TIMEOUT: return {"CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"};
    case CUDA_ERROR_LAUNCH_FAILED: return {"CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"};
    case CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE:
        return {"CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE", "too many blocks in cooperative launch"};
    case CUDA_ERROR_NOT_SUPPORTED: return {"CUDA_ERROR_NOT_SUPPORTED", "operation not supported"};
    case CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED:
        return {"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"};
    case CUDA_ERROR_STREAM_CAPTURE_INVALIDATED:
        return {"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "a previous error prevents the capture"};
    case CUDA_ERROR_STREAM_CAPTURE_IMPLICIT:
        return {"CUDA_ERROR_STREAM_CAPTURE_IMPLICIT", "the null stream depends on a captured stream"};
    default: return {"CUDA_ERROR_UNKNOWN", "an error that tests/cuda_device/launch.cpp does not name"};
    }
}

}  // namespace

extern "C" {

// ---- For the tests --------------------------------------------------------------------------------------------------

// describe(image): a path of a build for the host, then a line per kernel; null where there is none, which is reported.
void cuda_device_set_describe(const char *(*function)(const void *)) { describe = function; }

// The n-th launch of a kernel from now on fails; "any" stands for all of them.
void cuda_device_fail_launch(const char *kernel, int n)
{
    std::lock_guard<std::recursive_mutex> lock(mutex);
    failing[kernel] = n;
}

// A line for each kernel that ran from PTX, or from its source: its name, and how often; valid until the next call.
const char *cuda_device_launches(int from_ptx)
{
    std::lock_guard<std::recursive_mutex> lock(mutex);
    static std::string text;
    text.clear();
    for (const auto &[name, count] : launches[from_ptx != 0])
        text += name + " " + std::to_string(count) + "\n";
    return text.c_str();
}

// ---- Runtime API: the device ----------------------------------------------------------------------------------------

cudaError_t cudaDriverGetVersion(int *version) { return *version = DRIVER_VERSION, cudaSuccess; }
cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }

cudaError_t cudaGetDevice(int *index)
{
    RUNTIME_ENTRY;
    return *index = 0, cudaSuccess;
}

cudaError_t cudaSetDevice(int index)
{
    RUNTIME_ENTRY;
    return index == 0 ? cudaSuccess : returned(cudaErrorInvalidDevice);
}

cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int)
{
    std::snprintf(text, size, "0000:00:00.0");
    return cudaSuccess;
}

// Attributes that are not listed are 0: CuPy asks for all there are.
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int)
{
    RUNTIME_ENTRY;
    const std::map<cudaDeviceAttr, int> values = {
        {cudaDevAttrMaxThreadsPerBlock, MAX_THREADS},
        {cudaDevAttrMaxBlockDimX, MAX_THREADS},
        {cudaDevAttrMaxBlockDimY, MAX_THREADS},
        {cudaDevAttrMaxBlockDimZ, 64},
        {cudaDevAttrMaxGridDimX, 2147483647},
        {cudaDevAttrMaxGridDimY, 65535},
        {cudaDevAttrMaxGridDimZ, 65535},
        {cudaDevAttrMaxSharedMemoryPerBlock, SHARED_WITHOUT_ASKING},
        {cudaDevAttrWarpSize, 32},
        {cudaDevAttrMaxRegistersPerBlock, REGISTERS},
        {cudaDevAttrMultiProcessorCount, settings.multiprocessors},
        {cudaDevAttrL2CacheSize, 1 << 20},  // of no GPU; only benchmarks ask for it
        {cudaDevAttrMaxThreadsPerMultiProcessor, limits_of(settings.capability).threads},
        {cudaDevAttrUnifiedAddressing, 1},
        {cudaDevAttrComputeCapabilityMajor, settings.capability / 10},
        {cudaDevAttrComputeCapabilityMinor, settings.capability % 10},
        {cudaDevAttrMaxSharedMemoryPerMultiprocessor, settings.shared_bytes + reserved_shared_bytes()},
        {cudaDevAttrMaxRegistersPerMultiprocessor, REGISTERS},
        {cudaDevAttrManagedMemory, 0},
        {cudaDevAttrCooperativeLaunch, 1},
        {cudaDevAttrMaxSharedMemoryPerBlockOptin, settings.shared_bytes},
        {cudaDevAttrMaxBlocksPerMultiprocessor, limits_of(settings.capability).blocks},
        {cudaDevAttrReservedSharedMemoryPerBlock, reserved_shared_bytes()},
        {cudaDevAttrMemoryPoolsSupported, 0},
    };
    auto it = values.find(attribute);
    *value = it == values.end() ? 0 : it->second;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int)
{
    RUNTIME_ENTRY;
    *properties = {};
    std::snprintf(properties->name, sizeof properties->name, "%s", settings.name);
    properties->totalGlobalMem = settings.memory_bytes;
    properties->major = settings.capability / 10;
    properties->minor = settings.capability % 10;
    properties->multiProcessorCount = settings.multiprocessors;
    properties->sharedMemPerBlock = SHARED_WITHOUT_ASKING;
    properties->sharedMemPerBlockOptin = settings.shared_bytes;
    properties->warpSize = 32;
    properties->maxThreadsPerBlock = MAX_THREADS;
    return cudaSuccess;
}

// ---- Driver API -----------------------------------------------------------------------------------------------------

CUresult cuGetErrorName(CUresult error, const char **text) { return *text = error_text(error).first, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) { return *text = error_text(error).second, CUDA_SUCCESS; }

CUresult cuCtxGetCurrent(CUcontext *context)
{
    *context = reinterpret_cast<CUcontext>(1);
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *handle, const void *image)
{
    {
        DRIVER_ENTRY;
        for (Stream *stream : streams)
            if (stream->capture) {  // drivers before CUDA 12.3 refuse it
                report("a module is loaded while a stream is captured");
                return CUresult(invalidate(stream->capture, cudaErrorStreamCaptureUnsupported));
            }
    }
    const char *text = describe(image);  // Python: without the lock
    DRIVER_ENTRY;
    if (!text)
        return CUDA_ERROR_NOT_SUPPORTED;
    std::istringstream lines(text);
    std::string path, number;
    std::getline(lines, path);
    std::getline(lines, number);
    const int architecture = std::stoi(number);  // its machine code runs on later GPUs of the same generation too
    if (architecture / 10 != settings.first_capability / 10 || architecture > settings.first_capability)
        return CUDA_ERROR_NO_BINARY_FOR_GPU;
    void *library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        report(dlerror());
        return CUDA_ERROR_INVALID_IMAGE;
    }
    Module *module = new Module;
    for (std::string line; std::getline(lines, line);) {
        std::shared_ptr<Function> function = described(line);
        function->launch = reinterpret_cast<decltype(function->launch)>(dlsym(library, "host_cuda_launch"));
        function->arrays = reinterpret_cast<decltype(function->arrays)>(dlsym(library, "ptx_arrays"));
        function->wrong_counter =
            reinterpret_cast<decltype(function->wrong_counter)>(dlsym(library, "ptx_wrong_counter"));
        functions[function.get()] = (*module)[function->name] = function;
    }
    modules.insert(module);
    *handle = reinterpret_cast<CUmodule>(module);
    return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule handle)
{
    DRIVER_ENTRY;
    Module *module = reinterpret_cast<Module *>(handle);
    if (!modules.erase(module))
        return CUDA_ERROR_INVALID_HANDLE;
    finish_all();
    for (auto &[name, function] : *module) {
        function->loaded = false;
        functions.erase(function.get());
    }
    delete module;
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *handle, CUmodule module_handle, const char *name)
{
    DRIVER_ENTRY;
    Module *module = reinterpret_cast<Module *>(module_handle);
    if (!modules.count(module))
        return CUDA_ERROR_INVALID_HANDLE;
    auto it = module->find(name);
    if (it == module->end())
        return CUDA_ERROR_NOT_FOUND;
    *handle = reinterpret_cast<CUfunction>(it->second.get());
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction handle)
{
    DRIVER_ENTRY;
    const Function *function = function_of(handle);
    if (!function)
        return CUDA_ERROR_INVALID_HANDLE;
    switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = function->max_threads; break;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = function->shared_bytes; break;
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = function->registers; break;
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: *value = function->max_dynamic; break;
    default:
        report("the attribute " + std::to_string(attribute) + " of a kernel is not modelled");
        return CUDA_ERROR_NOT_SUPPORTED;
    }
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction handle, CUfunction_attribute attribute, int value)
{
    DRIVER_ENTRY;
    Function *function = function_of(handle);
    if (!function)
        return CUDA_ERROR_INVALID_HANDLE;
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
        report("the attribute " + std::to_string(attribute) + " of a kernel is not modelled");
        return CUDA_ERROR_NOT_SUPPORTED;
    }
    if (value < 0 || value + function->shared_bytes > settings.shared_bytes)
        return CUDA_ERROR_INVALID_VALUE;
    function->max_dynamic = value;
    return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction handle, int threads,
                                                     std::size_t shared_bytes)
{
    DRIVER_ENTRY;
    const Function *function = function_of(handle);
    if (!function)
        return CUDA_ERROR_INVALID_HANDLE;
    if (threads < 1 || threads > MAX_THREADS)
        return CUDA_ERROR_INVALID_VALUE;
    *blocks = blocks_per_multiprocessor(*function, threads, shared_bytes);
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream stream, void **parameters,
                        void **)
{
    DRIVER_ENTRY;
    const Shape shape{{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_bytes, false};
    return launch(function, shape, stream, parameters);
}

CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                                   CUstream stream, void **parameters)
{
    DRIVER_ENTRY;
    const Shape shape{{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_bytes, true};
    return launch(function, shape, stream, parameters);
}

}  // extern "C"
