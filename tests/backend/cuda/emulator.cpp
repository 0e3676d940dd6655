// Runs the blocks of a kernel one after the other, the threads of a block as fibers: each on a stack of its own, until it waits
// for others or returns. See emulate.h.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>

#include "emulate.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;
unsigned char* emulator_shared;

namespace {

constexpr int largest_block = 1024, lane_bytes = 128, guard_bytes = 256;
constexpr size_t stack_bytes = (96 << 10) + 320;  // no power of two: or the tops of all stacks share a few lines of the cache
constexpr unsigned long long canary = 0x5AFE57AC5AFE57ACull;
constexpr unsigned char guard = 0xA5;

enum State { ready, at_block, at_warp, returned };

// In the calling conventions of x86-64 (System V) and of aarch64, whole numbers and pointers on one hand and floats on the other
// take registers in order, each kind its own; what is left over lies on the stack in order. With at most 8 doubles these never
// need the stack. So a call with 24 whole numbers and 8 doubles fits every kernel that has fewer, in any mixture.
using Kernel = void (*)(long long, long long, long long, long long, long long, long long, long long, long long, long long, long long,
                        long long, long long, long long, long long, long long, long long, long long, long long, long long, long long,
                        long long, long long, long long, long long, double, double, double, double, double, double, double, double);

#if defined(__x86_64__)
using Context = void*;  // the stack pointer; the registers to keep lie on top of the stack
extern "C" void emulator_switch(Context* from, Context to);
asm(R"(
    .text
    .globl emulator_switch
    .hidden emulator_switch
emulator_switch:
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
)");

void start(Context& context, unsigned char* stack, void (*body)()) {
    auto top = reinterpret_cast<void**>((reinterpret_cast<size_t>(stack) + stack_bytes) & ~size_t(15));
    *--top = nullptr;  // the return address of body, which never returns
    *--top = reinterpret_cast<void*>(body);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    context = top;
}

void switch_to(Context& from, Context& to) { emulator_switch(&from, to); }
#else
using Context = ucontext_t;

void start(Context& context, unsigned char* stack, void (*body)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack + 16;
    context.uc_stack.ss_size = stack_bytes - 16;
    context.uc_link = nullptr;
    makecontext(&context, body, 0);
}

void switch_to(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

struct Fiber {
    Context context;
    State state;
    int kind, size;      // of the exchange it waits in
    unsigned exchanges;  // so far
    dim3 place;
};

struct Exchange {
    alignas(16) unsigned char bytes[2][32][lane_bytes];  // two in turn: nobody gives again before all have read
};

Context scheduler;
Fiber fibers[largest_block];
Exchange exchanges[largest_block / 32];
unsigned char* stacks;
int current, num_threads;
Kernel kernel;
unsigned char* static_shared;
long long static_bytes;  // of all kernels of the file
long long whole[24];
double floats[8];
char* message;
int message_bytes;

void body() {
    const long long* a = whole;
    const double* d = floats;
    kernel(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15], a[16], a[17], a[18],
           a[19], a[20], a[21], a[22], a[23], d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]);
    fibers[current].state = returned;
    switch_to(fibers[current].context, scheduler);
    __builtin_unreachable();
}

void wait_as(State state) {
    Fiber& fiber = fibers[current];
    fiber.state = state;
    switch_to(fiber.context, scheduler);
}

unsigned char* stack_of(int i) { return stacks + i * stack_bytes; }

bool fail(const char* what) {
    int number[4] = {};
    for (int i = 0; i < num_threads; ++i) ++number[fibers[i].state];
    snprintf(message, message_bytes, "block (%u, %u, %u): %s; %d threads wait in a warp operation, %d at __syncthreads, %d have returned",
             blockIdx.x, blockIdx.y, blockIdx.z, what, number[at_warp], number[at_block], number[returned]);
    return false;
}

// Runs the lanes of a warp until each has returned or waits for other warps.
bool run_warp(int warp, bool backwards) {
    Fiber* lanes = fibers + 32 * warp;
    for (;;) {
        for (int i = 0; i < 32; ++i) {
            const int lane = backwards ? 31 - i : i;
            if (lanes[lane].state != ready) continue;
            current = 32 * warp + lane;
            threadIdx = lanes[lane].place;
            switch_to(scheduler, lanes[lane].context);
        }
        int waiting = 0;
        for (int lane = 0; lane < 32; ++lane) waiting += lanes[lane].state == at_warp;
        if (waiting == 0) return true;
        if (waiting < 32) return fail("a warp operation that not all 32 lanes reach");
        for (int lane = 0; lane < 32; ++lane) {
            if (lanes[lane].kind != lanes[0].kind || lanes[lane].size != lanes[0].size)
                return fail("lanes of a warp meet in different operations");
            lanes[lane].state = ready;
        }
    }
}

// The last thread comes first in every other block, beginning with the first: a missing barrier shows.
bool run_block(int shared_bytes) {
    if (static_bytes) memset(static_shared, 0xFF, static_bytes);
    memset(emulator_shared, 0xFF, shared_bytes);
    memset(emulator_shared + shared_bytes, guard, guard_bytes);
    const bool backwards = (blockIdx.x + blockIdx.y + blockIdx.z) % 2 == 0;
    for (int i = 0; i < num_threads; ++i) {
        Fiber& fiber = fibers[i];
        start(fiber.context, stack_of(i), body);
        memcpy(stack_of(i), &canary, sizeof canary);
        fiber.state = ready;
        fiber.exchanges = 0;
    }
    for (int waiting = 1; waiting;) {
        const int num_warps = num_threads / 32;
        for (int i = 0; i < num_warps; ++i)
            if (!run_warp(backwards ? num_warps - 1 - i : i, backwards)) return false;
        waiting = 0;
        for (int i = 0; i < num_threads; ++i)
            if (fibers[i].state == at_block) {  // those that returned count as arrived
                fibers[i].state = ready;
                ++waiting;
            }
    }
    for (int i = 0; i < num_threads; ++i)
        if (memcmp(stack_of(i), &canary, sizeof canary)) return fail("a thread needs more stack than the emulator gives");
    for (int i = 0; i < guard_bytes; ++i)
        if (emulator_shared[shared_bytes + i] != guard) return fail("written past the end of dynamic shared memory");
    return true;
}

}  // namespace

void emulator_block_barrier() { wait_as(at_block); }

const unsigned char* emulator_warp_exchange(int kind, const void* bytes, int size) {
    Fiber& fiber = fibers[current];
    auto& turn = exchanges[current / 32].bytes[fiber.exchanges++ % 2];
    memcpy(turn[current % 32], bytes, size);
    fiber.kind = kind;
    fiber.size = size;
    wait_as(at_warp);
    return turn[0];
}

// 0, or 1 with a message. grid, block: 3 numbers each; whole_numbers: 24, doubles: 8; shared_of: shared_of_library of the kernel's
// library.
extern "C" int emulator_launch(void* function, unsigned char* (*shared_of)(long long*), const unsigned* grid, const unsigned* block,
                               const long long* whole_numbers, const double* doubles, int shared_bytes, char* text, int text_bytes) {
    static_shared = shared_of(&static_bytes);
    if (!stacks)
        stacks = static_cast<unsigned char*>(mmap(nullptr, largest_block * stack_bytes, PROT_READ | PROT_WRITE,
                                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    kernel = reinterpret_cast<Kernel>(function);
    memcpy(whole, whole_numbers, sizeof whole);
    memcpy(floats, doubles, sizeof floats);
    message = text;
    message_bytes = text_bytes;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    num_threads = int(block[0] * block[1] * block[2]);
    for (int i = 0; i < num_threads; ++i)
        fibers[i].place = {i % block[0], i / block[0] % block[1], i / (block[0] * block[1])};
    emulator_shared = static_cast<unsigned char*>(aligned_alloc(1024, (size_t(shared_bytes) + guard_bytes + 1023) / 1024 * 1024));
    bool good = true;
    for (unsigned z = 0; z < grid[2] && good; ++z)
        for (unsigned y = 0; y < grid[1] && good; ++y)
            for (unsigned x = 0; x < grid[0] && good; ++x) {
                blockIdx = {x, y, z};
                good = run_block(shared_bytes);
            }
    free(emulator_shared);
    return good ? 0 : 1;
}
