#include "emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cocoop_fast {
extern uint4 shared_memory[];
uint4 shared_memory[(48 << 10) / sizeof(uint4)];
}  // namespace cocoop_fast

namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kSharedBytes = sizeof(cocoop_fast::shared_memory);

enum class State { ready, at_block_barrier, at_warp_barrier, at_shuffle, done };

struct Fibre {
    sigjmp_buf context;
    bool started;
    State state;
    float value;       // what it gives to a shuffle, then what it gets
    int lane_mask;
    uint32_t blocks_barriers, warps_barriers;  // passed so far
    void* fake_stack;  // the address sanitizer's
};

// An access to some bytes.
struct Access {
    uint32_t block, thread, blocks_barriers, warps_barriers;
};
struct History {
    bool written = false;
    Access write;
    std::vector<Access> reads;  // since then
};

struct Block {
    std::vector<Fibre> fibres;
    uint32_t number = 0;
    int running = -1;
};

std::unique_ptr<char[]> stacks(new char[kMaxThreads * kStackBytes]);
sigjmp_buf scheduler;
Block block;
const std::function<void()>* kernel_of_launch;
size_t shared_bytes_of_launch;
std::string failure;
int launches, schedule;  // 0: threads in ascending order, 1: descending, else at random from this seed
std::mt19937 generator;
std::unordered_map<uintptr_t, History> global_history, shared_history;  // by pairs of bytes

void fail(const std::string& what) {
    if (!failure.empty()) return;
    failure = what + " (block " + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
              std::to_string(blockIdx.z) + ")";
}

// ---- fibres: a context of its own to begin with, then jumps, which unlike swapcontext() make no system call

#ifdef __SANITIZE_ADDRESS__
void* scheduler_fake_stack;
const void* scheduler_stack;
size_t scheduler_stack_bytes;

void leave_for(void** own_fake_stack, const void* stack, size_t bytes) {
    __sanitizer_start_switch_fiber(own_fake_stack, stack, bytes);
}
void arrive(void* own_fake_stack, const void** stack_before, size_t* bytes_before) {
    __sanitizer_finish_switch_fiber(own_fake_stack, stack_before, bytes_before);
}
#endif

void wait_at(State barrier) {
    Fibre& fibre = block.fibres[block.running];
    fibre.state = barrier;
    if (sigsetjmp(fibre.context, 0) == 0) {
#ifdef __SANITIZE_ADDRESS__
        leave_for(barrier == State::done ? nullptr : &fibre.fake_stack, scheduler_stack, scheduler_stack_bytes);
#endif
        siglongjmp(scheduler, 1);
    }
#ifdef __SANITIZE_ADDRESS__
    arrive(block.fibres[block.running].fake_stack, nullptr, nullptr);
#endif
}

void fibre_main() {
#ifdef __SANITIZE_ADDRESS__
    arrive(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
    (*kernel_of_launch)();
    wait_at(State::done);
}

void run_fibre(int thread) {
    Fibre& fibre = block.fibres[thread];
    block.running = thread;
    threadIdx = dim3(thread, 0, 0);
    if (sigsetjmp(scheduler, 0) == 0) {
        char* stack = stacks.get() + thread * kStackBytes;
#ifdef __SANITIZE_ADDRESS__
        leave_for(&scheduler_fake_stack, stack, kStackBytes);
#endif
        if (fibre.started) siglongjmp(fibre.context, 1);
        fibre.started = true;
        ucontext_t beginning;
        getcontext(&beginning);
        beginning.uc_stack.ss_sp = stack;
        beginning.uc_stack.ss_size = kStackBytes;
        beginning.uc_link = nullptr;
        makecontext(&beginning, fibre_main, 0);
        setcontext(&beginning);
    }
#ifdef __SANITIZE_ADDRESS__
    arrive(scheduler_fake_stack, nullptr, nullptr);
#endif
    block.running = -1;
}

std::vector<int> in_order(int first, int count) {
    std::vector<int> order(count);
    for (int i = 0; i < count; i++) order[i] = first + i;
    if (schedule == 1) std::reverse(order.begin(), order.end());
    if (schedule > 1) std::shuffle(order.begin(), order.end(), generator);
    return order;
}

const char* name_of(State state) {
    switch (state) {
        case State::at_block_barrier: return "__syncthreads()";
        case State::at_warp_barrier: return "__syncwarp()";
        case State::at_shuffle: return "a shuffle";
        case State::done: return "its end";
        default: return "running";
    }
}

// Runs what can run of a warp; then, if all lanes wait for each other, lets them go on. Whether anything happened.
bool step_warp(int first) {
    bool moved = false;
    for (const int thread : in_order(first, kWarp)) {
        if (block.fibres[thread].state != State::ready) continue;
        run_fibre(thread);
        moved = true;
    }
    Fibre* lanes = &block.fibres[first];
    const State state = lanes[0].state;
    for (int i = 1; i < kWarp; i++) {
        if (lanes[i].state == state) continue;
        const bool warp_waits = state == State::at_shuffle || state == State::at_warp_barrier ||
                                lanes[i].state == State::at_shuffle || lanes[i].state == State::at_warp_barrier;
        // One of them waits for the other, which cannot come any more.
        if (warp_waits || (state == State::done) != (lanes[i].state == State::done)) {
            fail("threads " + std::to_string(first) + " and " + std::to_string(first + i) +
                 " of a warp have parted: one is at " + name_of(state) + ", one at " + name_of(lanes[i].state));
        }
        return moved;
    }
    if (state == State::at_shuffle) {
        float values[kWarp];
        for (int i = 0; i < kWarp; i++) values[i] = lanes[i].value;
        for (int i = 0; i < kWarp; i++) lanes[i].value = values[(i ^ lanes[i].lane_mask) % kWarp];
    } else if (state != State::at_warp_barrier) {
        return moved;
    }
    for (int i = 0; i < kWarp; i++) {
        lanes[i].warps_barriers += state == State::at_warp_barrier;  // a shuffle orders no memory
        lanes[i].state = State::ready;
    }
    return true;
}

void run_block() {
    for (Fibre& fibre : block.fibres) fibre = Fibre{};
    std::memset(cocoop_fast::shared_memory, 0xff, shared_bytes_of_launch);
    shared_history.clear();
    const int warps = int(block.fibres.size()) / kWarp;
    while (failure.empty()) {
        bool moved = false;
        for (const int warp : in_order(0, warps)) {
            // A fixed schedule lets a warp run as far as it comes, a random one mixes their steps.
            while (failure.empty() && step_warp(warp * kWarp)) {
                moved = true;
                if (schedule > 1) break;
            }
        }
        if (moved) continue;
        size_t waiting = 0, done = 0;
        for (const Fibre& fibre : block.fibres) {
            waiting += fibre.state == State::at_block_barrier;
            done += fibre.state == State::done;
        }
        if (done == block.fibres.size()) return;
        if (waiting != block.fibres.size()) {
            fail(std::to_string(waiting) + " of " + std::to_string(block.fibres.size()) +
                 " threads wait at __syncthreads(), the others never come");
        }
        for (Fibre& fibre : block.fibres) {
            fibre.blocks_barriers++;
            fibre.state = State::ready;
        }
    }
}

// ---- races

bool ordered(const Access& a, const Access& b) {
    if (a.block != b.block) return false;
    return a.thread == b.thread || a.blocks_barriers != b.blocks_barriers ||
           (a.thread / kWarp == b.thread / kWarp && a.warps_barriers != b.warps_barriers);
}

void record(uintptr_t address, size_t bytes, bool write) {
    if (block.running < 0 || !failure.empty()) return;
    const auto stack = reinterpret_cast<uintptr_t>(stacks.get());
    if (address - stack < kMaxThreads * kStackBytes) return;
    const auto shared = reinterpret_cast<uintptr_t>(cocoop_fast::shared_memory);
    const bool in_shared = address - shared < kSharedBytes;
    if (in_shared && address - shared + bytes > shared_bytes_of_launch) {
        return fail("shared memory is used beyond the " + std::to_string(shared_bytes_of_launch) +
                    " bytes of the launch");
    }
    const Fibre& fibre = block.fibres[block.running];
    const Access access{block.number, uint32_t(block.running), fibre.blocks_barriers, fibre.warps_barriers};
    for (uintptr_t at = address / 2; at < (address + bytes + 1) / 2; at++) {
        History& history = (in_shared ? shared_history : global_history)[at];
        const Access* rival = history.written && !ordered(history.write, access) ? &history.write : nullptr;
        if (write) {
            for (const Access& read : history.reads) rival = ordered(read, access) ? rival : &read;
        }
        if (rival) {
            return fail("race in " + std::string(in_shared ? "shared" : "global") + " memory: " +
                        (write ? "write" : "read") + " by thread " + std::to_string(access.thread) +
                        ", another access by thread " + std::to_string(rival->thread) +
                        (rival->block == access.block ? " with no barrier between them" : " of another block"));
        }
        if (write) {
            history.written = true;
            history.write = access;
            history.reads.clear();
        } else {
            const auto same = [&](const Access& a) { return a.block == access.block && a.thread == access.thread; };
            const auto before = std::find_if(history.reads.begin(), history.reads.end(), same);
            if (before == history.reads.end()) {
                history.reads.push_back(access);
            } else {
                *before = access;
            }
        }
    }
}

}  // namespace

// ---- what kernels call

static void check_mask(unsigned mask) {
    if (mask != 0xffffffffu) fail("only whole warps are emulated");
}

void __syncthreads() { wait_at(State::at_block_barrier); }

void __syncwarp(unsigned mask) {
    check_mask(mask);
    wait_at(State::at_warp_barrier);
}

float __shfl_xor_sync(unsigned mask, float value, int lane_mask) {
    check_mask(mask);
    const int thread = block.running;
    block.fibres[thread].value = value;
    block.fibres[thread].lane_mask = lane_mask;
    wait_at(State::at_shuffle);
    return block.fibres[thread].value;
}

cudaError_t emulator::run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
    const unsigned threads = config.blockDim.x;
    launches++;
    failure.clear();
    if (threads == 0 || threads > kMaxThreads || threads % kWarp || config.dynamicSmemBytes > kSharedBytes ||
        config.gridDim.y > 65535 || config.gridDim.z > 65535) {
        return cudaErrorInvalidConfiguration;
    }
    kernel_of_launch = &kernel;
    shared_bytes_of_launch = config.dynamicSmemBytes;
    gridDim = config.gridDim;
    blockDim = config.blockDim;
    block.fibres.resize(threads);
    generator.seed(schedule);
    global_history.clear();
#ifdef __SANITIZE_ADDRESS__
    ASAN_POISON_MEMORY_REGION(reinterpret_cast<char*>(cocoop_fast::shared_memory) + shared_bytes_of_launch,
                              kSharedBytes - shared_bytes_of_launch);
#endif
    const int blocks = int(gridDim.x * gridDim.y * gridDim.z);
    for (const int number : in_order(0, blocks)) {
        block.number = number;
        blockIdx = dim3(number % gridDim.x, number / gridDim.x % gridDim.y, number / gridDim.x / gridDim.y);
        run_block();
        if (!failure.empty()) break;
    }
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(cocoop_fast::shared_memory, kSharedBytes);
#endif
    return failure.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

const char* cudaGetErrorString(cudaError_t error) {
    if (error == cudaErrorLaunchFailure) return failure.c_str();
    return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "invalid argument";
}

// ---- for tests, through ctypes

#define EXPORTED extern "C" __attribute__((visibility("default")))
EXPORTED void emulator_set_schedule(int number) { schedule = number; }
EXPORTED int emulator_count_launches() { return launches; }
EXPORTED float emulator_half_to_float(uint16_t bits);
EXPORTED uint16_t emulator_float_to_half(float x);
EXPORTED uint16_t emulator_float_to_bfloat16(float x);

#include "cuda_bf16.h"
#include "cuda_fp16.h"

float emulator_half_to_float(uint16_t bits) { return __half2float(__half{bits}); }
uint16_t emulator_float_to_half(float x) { return __float2half_rn(x).bits; }
uint16_t emulator_float_to_bfloat16(float x) { return __float2bfloat16_rn(x).bits; }

// ---- what -fsanitize=thread calls

#define ACCESSES(bytes)                                                                                     \
    extern "C" void __tsan_read##bytes(void* at) { record(reinterpret_cast<uintptr_t>(at), bytes, false); } \
    extern "C" void __tsan_write##bytes(void* at) { record(reinterpret_cast<uintptr_t>(at), bytes, true); } \
    extern "C" void __tsan_unaligned_read##bytes(void* at) { __tsan_read##bytes(at); }                      \
    extern "C" void __tsan_unaligned_write##bytes(void* at) { __tsan_write##bytes(at); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
extern "C" void __tsan_read_range(void* at, size_t n) { record(reinterpret_cast<uintptr_t>(at), n, false); }
extern "C" void __tsan_write_range(void* at, size_t n) { record(reinterpret_cast<uintptr_t>(at), n, true); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
