// CUDA for one kernel, on a CPU: every thread of every block is a fiber, all in one thread of the system.
//
// A fiber runs until it waits: for the other lanes of its warp, a barrier, or memory that another one writes. A seed
// decides who goes on first, who sleeps for a while and how late copies come, so that a wait that is missing shows as
// poison or as a difference between seeds. What it cannot show: orders of memory that the hardware may choose (all
// fibers see the same memory at once), and missing fences for the copy engine.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace emulator {

typedef unsigned long long Word;

constexpr int LANES = 32, NAMED_BARRIERS = 16;
constexpr size_t STACK_BYTES = 64 << 10, SHARED_BYTES = 227 << 10;
constexpr int POISON = 0xff;                // of it, floats and bfloat16 are NaN
constexpr Word PATIENCE = 200000;           // rounds in which nothing happens

struct Index {
  unsigned x;
};

// A fiber waits while what lies there is this.
struct Wait {
  const char* why;
  const Word* at;
  Word mask, value;
  bool over() const { return !at || (*at & mask) != value; }
  bool operator==(const Wait&) const = default;
};

struct Warp;
struct Block;

struct Fiber {
  void* stack_pointer;
  unsigned char* stack;
  Index thread;
  Block* block;
  Warp* warp;
  Wait wait;
  Word paused;  // the round in which it does not go on
  bool done;
};

struct Warp {
  Fiber* lanes;
  // What lanes have brought to the operation that all take part in.
  void* brought[LANES];
  int came;
  const char* operation;
  Word operations;
  Word asleep;  // until this round
  Wait wait;    // of all lanes, if it is the same
};

struct NamedBarrier {
  unsigned threads, came;
  Word rounds;
};

struct Block {
  Index index;
  unsigned char* shared;
  NamedBarrier barriers[NAMED_BARRIERS];
};

// As the barrier in shared memory is here; the last bit is the round's parity.
struct Round {
  unsigned short left, arrivals;
  int bytes : 31;
  unsigned parity : 1;
};
static_assert(sizeof(Round) == sizeof(Word));
constexpr Word PARITY = 1ull << 63;

// What the copy engine has still to do.
struct Copy {
  unsigned char* to;
  const void* from;  // nothing if it has only to arrive
  unsigned bytes;
  Word* barrier;
  Word due;  // the round
};

// Of a seed; the standard ones take longer than what they choose.
struct Random {
  typedef Word result_type;
  Word state;
  static constexpr Word min() { return 0; }
  static constexpr Word max() { return ~0ull; }
  Word operator()() {  // splitmix64
    Word x = state += 0x9e3779b97f4a7c15;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9, x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
  }
};

struct Machine {
  std::vector<Block> blocks;
  std::vector<Warp> warps;
  std::vector<Fiber> fibers;
  std::vector<Copy> copies;
  std::function<void()> body;
  Random random;
  Word round, last_event;
  int threads;  // of a block
  int left;     // fibers that are not done
  void* stack_pointer;
};

inline Machine machine;
inline Fiber* current;
inline Index grid;

extern "C" void switch_stacks(void** from, void* to);
asm(R"(
.text
.globl switch_stacks
switch_stacks:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

inline int lane_of(const Fiber& fiber) { return fiber.thread.x % LANES; }

[[noreturn]] inline void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  if (current) fprintf(stderr, "block %u, thread %u: ", current->block->index.x, current->thread.x);
  vfprintf(stderr, format, arguments);
  fprintf(stderr, "\n");
  _exit(2);
}

inline unsigned random_below(unsigned most) { return (machine.random() >> 32) * most >> 32; }

// Something happened that others may wait for.
inline void event() { machine.last_event = machine.round; }

inline void to_scheduler() { switch_stacks(&current->stack_pointer, machine.stack_pointer); }

// Lets others go on.
inline void pause(const char* why) {
  current->wait = {why, nullptr, 0, 0};
  current->paused = machine.round;
  to_scheduler();
}

inline void pause_sometimes(const char* why) {
  if (random_below(8) == 0) pause(why);
}

inline void wait_while(const char* why, const Word* at, Word mask, Word value) {
  current->wait = {why, at, mask, value};
  if (!current->wait.over()) to_scheduler();
}

// An operation of all lanes of a warp: the last that comes makes it for all, who find the result in what they brought.
template <class T, class Operation> void together(const char* name, T& own, Operation operation) {
  Warp& warp = *current->warp;
  if (warp.came > 0 && warp.operation != name) fail("%s, while other lanes are at %s", name, warp.operation);
  warp.operation = name;
  warp.brought[lane_of(*current)] = &own;
  if (++warp.came < LANES) return wait_while(name, &warp.operations, ~0ull, warp.operations);
  operation(reinterpret_cast<T**>(warp.brought));
  warp.came = 0, warp.operations++;
  event();
}

inline void meet_at(int number, unsigned threads) {
  if (number >= NAMED_BARRIERS) fail("barrier %d", number);
  NamedBarrier& barrier = current->block->barriers[number];
  if (barrier.came > 0 && barrier.threads != threads) fail("barrier %d: %u threads", number, threads);
  barrier.threads = threads;
  if (++barrier.came < threads) return wait_while("bar.sync", &barrier.rounds, ~0ull, barrier.rounds);
  barrier.came = 0, barrier.rounds++;
  event();
  pause_sometimes("after bar.sync");
}

inline void end_round(Round& round) {
  if (round.left > 0 || round.bytes != 0) return;
  round.left = round.arrivals, round.parity ^= 1;
  event();
}

inline void finish_copies() {
  auto late = [](const Copy& copy) {
    if (copy.due > machine.round) return true;
    if (copy.from) memcpy(copy.to, copy.from, copy.bytes);
    Round& round = *reinterpret_cast<Round*>(copy.barrier);
    round.bytes -= copy.bytes;
    end_round(round);
    return false;
  };
  // Not std::remove_if: in whichever order they come.
  for (size_t i = 0; i < machine.copies.size();)
    if (late(machine.copies[i])) i++;
    else machine.copies[i] = machine.copies.back(), machine.copies.pop_back();
}

inline void fiber_main() {
  machine.body();
  if (*reinterpret_cast<Word*>(current->stack)) fail("its stack is too small");
  current->done = true, machine.left--;
  event();
  to_scheduler();
}

inline void begin_fiber(Fiber& fiber) {
  if (!fiber.stack) fiber.stack = static_cast<unsigned char*>(mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE,
                                                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  void** top = reinterpret_cast<void**>(fiber.stack + STACK_BYTES) - 8;
  for (int i = 0; i < 6; i++) top[i] = nullptr;  // registers
  top[6] = reinterpret_cast<void*>(fiber_main);
  fiber.stack_pointer = top;
  fiber.wait = {"begin", nullptr, 0, 0};
  fiber.paused = 0, fiber.done = false;
}

inline void begin(int blocks, int threads, unsigned seed) {
  const int warps = threads / LANES;
  machine.random = {seed};
  machine.round = machine.last_event = 0, machine.left = blocks * threads;
  machine.threads = threads;
  grid = {static_cast<unsigned>(blocks)};
  const size_t before = machine.blocks.size();
  machine.blocks.resize(blocks), machine.warps.assign(blocks * warps, {});
  // Stacks are kept.
  if (machine.fibers.size() < size_t(blocks) * threads) machine.fibers.resize(blocks * threads);
  for (int i = 0; i < blocks; i++) {
    Block& block = machine.blocks[i];
    if (size_t(i) >= before) block.shared = static_cast<unsigned char*>(std::aligned_alloc(1024, SHARED_BYTES));
    block.index = {static_cast<unsigned>(i)};
    std::fill_n(block.barriers, NAMED_BARRIERS, NamedBarrier{});
    memset(block.shared, POISON, SHARED_BYTES);
  }
  for (int i = 0; i < blocks * threads; i++) {
    Fiber& fiber = machine.fibers[i];
    fiber.thread = {static_cast<unsigned>(i % threads)}, fiber.block = &machine.blocks[i / threads];
    fiber.warp = &machine.warps[i / LANES];
    if (i % LANES == 0) fiber.warp->lanes = &fiber;
    begin_fiber(fiber);
  }
}

// Most warps wait with all their lanes for one thing, which is soon seen.
inline Wait common_wait(const Warp& warp) {
  const Fiber* lanes = warp.lanes;
  for (int i = 0; i < LANES; i++)
    if (lanes[i].done || lanes[i].wait != lanes[0].wait) return {};
  return lanes[0].wait;
}

// Lets a warp's lanes go on, in some order, until all wait or it has had enough.
inline void take_turn(Warp& warp) {
  if (warp.asleep > machine.round || !warp.wait.over()) return;
  if (random_below(512) == 0) warp.asleep = machine.round + random_below(400);
  const unsigned first = random_below(LANES), step = 2 * random_below(LANES / 2) + 1;
  bool going = true;
  for (unsigned rounds = 1 + random_below(64); going && rounds > 0; rounds--) {
    going = false;
    for (unsigned i = 0; i < LANES; i++) {
      Fiber& fiber = warp.lanes[(first + i * step) % LANES];
      if (fiber.done || fiber.paused == machine.round || !fiber.wait.over()) continue;
      going = true;
      current = &fiber;
      switch_stacks(&machine.stack_pointer, fiber.stack_pointer);
      current = nullptr;
    }
  }
  warp.wait = common_wait(warp);
}

[[noreturn]] inline void give_up() {
  fprintf(stderr, "nothing happens any more; first of those that wait at the same place:\n");
  std::map<std::string, std::pair<const Fiber*, int>> places;
  for (size_t i = 0; i < machine.blocks.size() * machine.threads; i++) {
    const Fiber& fiber = machine.fibers[i];
    if (fiber.done) continue;
    const size_t at = reinterpret_cast<const unsigned char*>(fiber.wait.at) - fiber.block->shared;
    char text[200];
    snprintf(text, sizeof text, "block %2u, warp %2u: %s", fiber.block->index.x, fiber.thread.x / LANES,
             fiber.wait.why);
    std::string place = text;
    if (fiber.wait.at && at < SHARED_BYTES) place += ", barrier at byte " + std::to_string(at) + " of shared memory";
    auto& [first, count] = places[place];
    if (count++ == 0) first = &fiber;
  }
  for (const auto& [place, fibers] : places)
    fprintf(stderr, "%s: %d lanes, first %d\n", place.c_str(), fibers.second, lane_of(*fibers.first));
  _exit(2);
}

// Runs a kernel. Threads are a multiple of 32.
inline void launch(int blocks, int threads, unsigned seed, std::function<void()> body) {
  machine.body = std::move(body);
  begin(blocks, threads, seed);
  std::vector<Warp*> order;
  for (Warp& warp : machine.warps) order.push_back(&warp);
  while (machine.left > 0) {
    machine.round++;
    // Now and then, a whole block sleeps.
    if (random_below(256) == 0) {
      const Word until = machine.round + random_below(1000);
      const int sleeping = random_below(blocks), warps = threads / LANES;
      for (int i = 0; i < warps; i++) machine.warps[sleeping * warps + i].asleep = until;
    }
    finish_copies();
    std::shuffle(order.begin(), order.end(), machine.random);
    for (Warp* warp : order) take_turn(*warp);
    if (machine.round - machine.last_event > PATIENCE) give_up();
  }
  if (!machine.copies.empty()) fail("%zu copies were not waited for", machine.copies.size());
}

// Where the kernel reads or writes what is not there.
inline void on_fault(int, siginfo_t* about, void*) { fail("no memory at %p", about->si_addr); }

inline void catch_faults() {
  static unsigned char stack[64 << 10];
  const stack_t own = {stack, 0, sizeof stack};
  sigaltstack(&own, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = on_fault, action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, nullptr), sigaction(SIGBUS, &action, nullptr);
}

inline float float_of(unsigned bf16) { return std::bit_cast<float>(bf16 << 16); }

inline unsigned to_bf16(float x) {
  const unsigned bits = std::bit_cast<unsigned>(x);
  return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

}  // namespace emulator
