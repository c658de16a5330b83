// Gives the words of CUDA that reroute.cu uses their meaning on a CPU, so that g++ can compile it and a test can run it.
//
// Every CUDA thread is a fiber. One runs at a time, until it meets a barrier or a warp-wide operation; which comes next is
// drawn from a seed, but a warp runs as far ahead of the others as barriers let it. A missing barrier therefore shows:
// some warp reads what another has not written yet. Shared memory is filled with rubbish before every block, and threads
// that wait for one another at different operations are an error, not a hang.
//
// tests/support/reroute_on_host.cpp puts the two together.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include <ucontext.h>

#define __global__
#define __device__ static inline
#define __shared__ static __attribute__((section("shared_memory")))
#define __launch_bounds__(...)

extern "C" char __start_shared_memory[], __stop_shared_memory[];

struct Index {
    unsigned x;
};
static Index threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {

enum class Waiting { no, block_barrier, block_or, ballot, shuffle, sum, most, finished };  // ballot to most: warp-wide

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(64 * 1024);
    Waiting waiting = Waiting::no;
    unsigned operand = 0, result = 0;
    int source = 0, width = 32;
};

static ucontext_t scheduler;
static std::vector<Fiber> fibers;
static std::function<void()> kernel;

inline void enter() {
    kernel();
    fibers[threadIdx.x].waiting = Waiting::finished;
    swapcontext(&fibers[threadIdx.x].context, &scheduler);
}

// Hands the processor back until the scheduler has seen all threads that take part.
inline unsigned wait(Waiting what, unsigned operand = 0, int source = 0, int width = 32) {
    Fiber &fiber = fibers[threadIdx.x];
    fiber.waiting = what;
    fiber.operand = operand;
    fiber.source = source;
    fiber.width = width;
    swapcontext(&fiber.context, &scheduler);
    return fiber.result;
}

inline void run(unsigned thread) {
    threadIdx.x = thread;
    swapcontext(&scheduler, &fibers[thread].context);
}

// Ends a warp-wide operation that all 32 lanes have reached. Returns whether there was one.
inline bool finish_warp_operation(Fiber *lanes) {
    Waiting what = lanes[0].waiting;
    if (what < Waiting::ballot || what > Waiting::most) return false;
    for (int lane = 0; lane < 32; ++lane)
        if (lanes[lane].waiting != what) return false;
    unsigned ballot = 0, sum = 0;
    int most = static_cast<int>(lanes[0].operand);
    for (int lane = 0; lane < 32; ++lane) {
        ballot |= (lanes[lane].operand != 0) << lane;
        sum += lanes[lane].operand;
        most = std::max(most, static_cast<int>(lanes[lane].operand));
    }
    for (int lane = 0; lane < 32; ++lane) {
        Fiber &fiber = lanes[lane];
        int source = lane / fiber.width * fiber.width + fiber.source % fiber.width;
        fiber.result = what == Waiting::ballot ? ballot
                       : what == Waiting::sum  ? sum
                       : what == Waiting::most ? most
                                               : lanes[source].operand;
        fiber.waiting = Waiting::no;
    }
    return true;
}

// Runs one block. Returns null, or what went wrong.
inline const char *run_block(unsigned threads, std::mt19937 &random) {
    // 0x0303 is the index of some expert, 771: a kernel without a barrier is wrong, but writes into no one else's memory.
    memset(__start_shared_memory, 3, __stop_shared_memory - __start_shared_memory);
    for (Fiber &fiber : fibers) {
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
        fiber.waiting = Waiting::no;
    }
    std::vector<unsigned> warps(threads / 32), lanes(32);
    for (unsigned i = 0; i < warps.size(); ++i) warps[i] = i;
    for (unsigned i = 0; i < 32; ++i) lanes[i] = i;
    while (true) {
        bool progress = false;
        std::shuffle(warps.begin(), warps.end(), random);
        for (unsigned warp : warps) {
            bool more = true;
            while (more) {  // as far as this warp gets
                more = false;
                std::shuffle(lanes.begin(), lanes.end(), random);
                for (unsigned lane : lanes) {
                    if (fibers[warp * 32 + lane].waiting != Waiting::no) continue;
                    run(warp * 32 + lane);
                    more = progress = true;
                }
                if (finish_warp_operation(&fibers[warp * 32])) more = progress = true;
            }
        }
        Waiting what = fibers[0].waiting;
        bool same = true, any = false;
        for (Fiber &fiber : fibers) {
            same &= fiber.waiting == what;
            any |= fiber.operand != 0;
        }
        if (same && what == Waiting::finished) return nullptr;
        if (same && (what == Waiting::block_barrier || what == Waiting::block_or)) {
            for (Fiber &fiber : fibers) {
                fiber.result = any;
                fiber.waiting = Waiting::no;
            }
        } else if (!progress) {
            return "threads wait for one another at different barriers or warp-wide operations";
        }
    }
}

// Runs a grid of blocks, one after the other in an order drawn from the seed. Returns null, or what went wrong.
inline const char *launch(unsigned blocks, unsigned threads, unsigned seed, std::function<void()> body) {
    std::mt19937 random(seed);
    if (fibers.size() != threads) fibers = std::vector<Fiber>(threads);
    kernel = body;
    blockDim.x = threads;
    gridDim.x = blocks;
    std::vector<unsigned> order(blocks);
    for (unsigned i = 0; i < blocks; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random);
    for (unsigned block : order) {
        blockIdx.x = block;
        if (const char *error = run_block(threads, random)) return error;
    }
    return nullptr;
}

template <typename To, typename From>
To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::wait(cuda_on_host::Waiting::block_barrier); }
inline int __syncthreads_or(int value) { return cuda_on_host::wait(cuda_on_host::Waiting::block_or, value); }
inline void __threadfence() {}
inline unsigned __ballot_sync(unsigned, int value) { return cuda_on_host::wait(cuda_on_host::Waiting::ballot, value); }
template <typename T>
T __reduce_add_sync(unsigned, T value) { return cuda_on_host::wait(cuda_on_host::Waiting::sum, value); }
inline int __reduce_max_sync(unsigned, int value) { return cuda_on_host::wait(cuda_on_host::Waiting::most, value); }

template <typename T>
T __shfl_sync(unsigned, T value, int source, int width = 32) {
    unsigned operand = cuda_on_host::bits<unsigned>(value);
    return cuda_on_host::bits<T>(cuda_on_host::wait(cuda_on_host::Waiting::shuffle, operand, source, width));
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
    return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ other);
}

template <typename T>
T atomicAdd(T *address, T value) {  // one fiber runs at a time
    T before = *address;
    *address += value;
    return before;
}

using std::max;
inline float __uint_as_float(unsigned value) { return cuda_on_host::bits<float>(value); }
inline unsigned __float_as_uint(float value) { return cuda_on_host::bits<unsigned>(value); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(unsigned value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value ? __builtin_clz(value) : 32; }
