// A built module as a program of its own, as the sanitizers need it: the launch comes from a file, the results go to
// another.
//
//   module                    prints the signatures
//   module REQUEST RESULTS    runs the launch; exit status 0, or 3 with a report on stderr where it could not end
//
// REQUEST is a line of text (kernel, grid, block, shared bytes, cooperative, order, seed, buffers, arguments), then per
// buffer its size in 8 bytes and its content, then per argument two numbers of 8 bytes: the index of its buffer and an
// offset into it, or -1 and the bits of a scalar. RESULTS is the content of the buffers, then the numbers of group
// barriers and mma calls.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "launch.h"

namespace {

constexpr std::size_t BUFFER_ALIGNMENT = 256;  // as cudaMalloc gives it

void read(std::FILE *file, void *target, std::size_t bytes)
{
    if (std::fread(target, 1, bytes, file) != bytes)
        std::exit(2);
}

}  // namespace

int main(int argument_count, char **arguments)
{
    if (argument_count == 1) {
        std::fputs(host_cuda_signatures(), stdout);
        return 0;
    }
    std::FILE *file = std::fopen(arguments[1], "rb");
    char kernel[256];
    LaunchRequest request = {};
    int order;
    unsigned long long shared_bytes, seed, buffer_count, parameter_count;
    if (!file || std::fscanf(file, "%255s %u %u %u %u %u %u %llu %d %d %llu %llu %llu", kernel, &request.grid[0],
                             &request.grid[1], &request.grid[2], &request.block[0], &request.block[1],
                             &request.block[2], &shared_bytes, &request.cooperative, &order, &seed, &buffer_count,
                             &parameter_count) != 13)
        return 2;
    std::fgetc(file);
    request.kernel = kernel;
    request.shared_bytes = shared_bytes;
    request.order = Order(order);
    request.seed = seed;

    std::vector<char *> buffers(buffer_count);
    std::vector<std::uint64_t> sizes(buffer_count);
    for (std::size_t i = 0; i < buffer_count; ++i) {
        read(file, &sizes[i], sizeof(sizes[i]));
        void *buffer;
        if (posix_memalign(&buffer, BUFFER_ALIGNMENT, sizes[i]))
            return 2;
        buffers[i] = static_cast<char *>(buffer);
        read(file, buffers[i], sizes[i]);
    }
    std::vector<std::uint64_t> values(parameter_count);
    std::vector<void *> pointers(parameter_count);
    for (std::size_t i = 0; i < parameter_count; ++i) {
        std::int64_t buffer;
        read(file, &buffer, sizeof(buffer));
        read(file, &values[i], sizeof(values[i]));
        if (buffer >= 0)
            values[i] += reinterpret_cast<std::uint64_t>(buffers[buffer]);
        pointers[i] = &values[i];
    }
    std::fclose(file);
    request.arguments = pointers.data();

    if (const char *report = host_cuda_launch(&request)) {
        std::fprintf(stderr, "%s\n", report);
        std::fflush(stderr);
        std::_Exit(3);
    }
    file = std::fopen(arguments[2], "wb");
    if (!file)
        return 2;
    for (std::size_t i = 0; i < buffer_count; ++i)
        std::fwrite(buffers[i], 1, sizes[i], file);
    const std::uint64_t counts[2] = {request.group_barriers, request.mma_calls};
    std::fwrite(counts, sizeof(counts[0]), 2, file);
    std::fclose(file);
    return 0;
}
