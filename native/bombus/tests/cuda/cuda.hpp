// What CUDA C++ has, and what `primitives.cuh` and `barriers.cuh` have in its place, in the emulator.
#pragma once

#include "emulator.hpp"

#define __device__
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::current->block->index)
#define gridDim (emulator::grid)
#define blockDim (emulator::Index{static_cast<unsigned>(emulator::machine.threads)})

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

// Also of two types, as CUDA has them.
template <class A, class B> constexpr std::common_type_t<A, B> min(A a, B b) {
  typedef std::common_type_t<A, B> Both;
  return std::min<Both>(a, b);
}
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline long long __float2ll_rn(float x) { return x >= 0x1p63f ? INT64_MAX : llrintf(x); }
inline float __expf(float x) { return expf(x); }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline long long clock64() { return static_cast<long long>(emulator::machine.round); }

inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const emulator::Word both = (emulator::Word)y << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) result |= unsigned(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}

inline void __threadfence() {}

template <class T> T atomicAdd(T* at, std::type_identity_t<T> amount) {
  emulator::event();
  emulator::pause_sometimes("atomicAdd");
  return std::exchange(*at, *at + amount);
}

inline void __syncthreads() { emulator::meet_at(0, emulator::machine.threads); }

// Of masks, only that of all lanes.
inline void check_mask(unsigned mask) {
  if (mask != 0xffffffff) emulator::fail("mask %x", mask);
}

inline void __syncwarp(unsigned mask = 0xffffffff) {
  check_mask(mask);
  int nothing = 0;
  emulator::together("__syncwarp", nothing, [](int**) {});
}

// What another lane has.
template <class T> T shuffle(const char* name, T own, int from) {
  struct Number {
    T x;
    int from;
    T found;
  } number = {own, from, own};
  emulator::together(name, number, [](Number** lanes) {
    for (int i = 0; i < emulator::LANES; i++) lanes[i]->found = lanes[lanes[i]->from]->x;
  });
  return number.found;
}

template <class T> T __shfl_xor_sync(unsigned mask, T own, int other) {
  check_mask(mask);
  return shuffle("__shfl_xor_sync", own, lane_of(*emulator::current) ^ other);
}

template <class T> T __shfl_sync(unsigned mask, T own, int from) {
  check_mask(mask);
  return shuffle("__shfl_sync", own, from % emulator::LANES);
}

// What `primitives.cuh` has.

inline unsigned transpose(unsigned two) {
  const unsigned row = lane_of(*emulator::current) / 4, column = lane_of(*emulator::current) % 4 * 2;
  unsigned transposed = 0;
  for (unsigned i = 0; i < 2; i++) {
    const unsigned own = __shfl_sync(0xffffffff, two, (column + i) * 4 + row / 2);
    transposed |= (own >> row % 2 * 16 & 0xffff) << 16 * i;
  }
  return transposed;
}

inline void multiply(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  struct Operands {
    float* c;
    unsigned a[4], b[2];
  } own = {c, {a0, a1, a2, a3}, {b0, b1}};
  emulator::together("mma", own, [](Operands** lanes) {
    float a[16][16], b[16][8], c[16][8] = {};
    for (int lane = 0; lane < emulator::LANES; lane++) {
      const int row = lane / 4, column = lane % 4 * 2;
      for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++)
          a[row + i % 2 * 8][column + i / 2 * 8 + j] = emulator::float_of(lanes[lane]->a[i] >> 16 * j & 0xffff);
      for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++)
          b[column + i * 8 + j][row] = emulator::float_of(lanes[lane]->b[i] >> 16 * j & 0xffff);
    }
    for (int m = 0; m < 16; m++)
      for (int k = 0; k < 16; k++)
        for (int n = 0; n < 8; n++) c[m][n] += a[m][k] * b[k][n];
    for (int lane = 0; lane < emulator::LANES; lane++)
      for (int i = 0; i < 4; i++) lanes[lane]->c[i] += c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  });
}

// Copies of a thread that it has not waited for, and how many groups it has begun.
struct AsyncCopies {
  struct Copy {
    void* to;
    const void* from;
    int group;
  };
  std::vector<Copy> copies;
  int groups = 0;
};
inline std::map<const emulator::Fiber*, AsyncCopies> async_copies;

// What was there is gone at once, and the copy comes when it is waited for.
inline void copy_async(void* to, const void* from) {
  if (((uintptr_t)to | (uintptr_t)from) % 16) emulator::fail("a copy from %p to %p", from, to);
  memset(to, emulator::POISON, 16);
  AsyncCopies& own = async_copies[emulator::current];
  own.copies.push_back({to, from, own.groups});
}
inline void commit_copies() { async_copies[emulator::current].groups++; }
template <int GROUPS> inline void wait_copies() {
  AsyncCopies& own = async_copies[emulator::current];
  std::erase_if(own.copies, [&](const AsyncCopies::Copy& copy) {
    if (copy.group >= own.groups - GROUPS) return false;
    memcpy(copy.to, copy.from, 16);
    return true;
  });
}

// Of four matrices of 8 by 8, whose rows lanes have, two neighbours in a row, or in a column.
inline void load_matrices_of(unsigned (&to)[4], const void* row, bool transposed) {
  struct Operands {
    const unsigned short* row;
    unsigned (*to)[4];
    bool transposed;
  } own = {static_cast<const unsigned short*>(row), &to, transposed};
  emulator::together("ldmatrix", own, [](Operands** lanes) {
    for (int lane = 0; lane < emulator::LANES; lane++)
      for (int i = 0; i < 4; i++) {
        const auto number = [&](int row, int column) -> unsigned { return lanes[i * 8 + row]->row[column]; };
        const int a = lane / 4, b = lane % 4 * 2;
        (*lanes[lane]->to)[i] = lanes[lane]->transposed ? number(b, a) | number(b + 1, a) << 16
                                                        : number(a, b) | number(a, b + 1) << 16;
      }
  });
}
inline void load_matrices(unsigned (&to)[4], const void* row) { load_matrices_of(to, row, false); }
inline void load_matrices_transposed(unsigned (&to)[4], const void* row) { load_matrices_of(to, row, true); }

inline unsigned load_acquire(const unsigned* at) {
  emulator::pause("ld.acquire");
  return *at;
}
inline void add_relaxed(unsigned long long* at, unsigned long long amount) { atomicAdd(at, amount); }
inline void add_release(unsigned* at, unsigned amount) { atomicAdd(at, amount); }
inline unsigned fetch_add(unsigned* at, unsigned amount) { return atomicAdd(at, amount); }
inline void forget(int&) {}
inline unsigned long long nanoseconds() { return emulator::machine.round; }
inline void prefetch(const void*) {}
inline void team_sync(int team, int threads) { emulator::meet_at(team + 1, threads); }
inline unsigned char* dynamic_shared() { return emulator::current->block->shared; }

inline unsigned pack_bf16(float low, float high) { return emulator::to_bf16(low) | emulator::to_bf16(high) << 16; }

// Of every pair of bfloat16.
template <class Operation> unsigned of_pairs(unsigned x, unsigned y, unsigned z, Operation operation) {
  unsigned result = 0;
  for (int i = 0; i < 32; i += 16) {
    const auto number = [&](unsigned pair) { return double(emulator::float_of(pair >> i & 0xffff)); };
    result |= emulator::to_bf16(float(operation(number(x), number(y), number(z)))) << i;
  }
  return result;
}
inline unsigned subtract(unsigned x, unsigned y) {
  return of_pairs(x, y, 0, [](double x, double y, double) { return x - y; });
}
inline unsigned multiply_add(unsigned x, unsigned y, unsigned z) {
  return of_pairs(x, y, z, [](double x, double y, double z) { return x * y + z; });
}
inline unsigned twice_low(unsigned two) { return __byte_perm(two, 0, 0x1010); }
inline unsigned twice_high(unsigned two) { return __byte_perm(two, 0, 0x3232); }

// What `barriers.cuh` has.

typedef unsigned long long Barrier;

inline emulator::Round& round_of(Barrier* barrier) { return *reinterpret_cast<emulator::Round*>(barrier); }

inline void begin_barrier(Barrier* barrier, int arrivals) {
  const auto number = static_cast<unsigned short>(arrivals);
  round_of(barrier) = {number, number, 0, 0};
}

inline void arrive_expecting(Barrier* barrier, unsigned bytes) {
  emulator::Round& round = round_of(barrier);
  if (round.left == 0) emulator::fail("too many arrivals");
  round.left--, round.bytes += bytes;
  emulator::end_round(round);
  emulator::pause_sometimes("mbarrier.arrive");
}

inline void arrive(Barrier* barrier) { arrive_expecting(barrier, 0); }

inline void wait(Barrier* barrier, unsigned parity) {
  emulator::wait_while(parity ? "mbarrier, parity 1" : "mbarrier, parity 0", barrier, emulator::PARITY,
                       parity ? emulator::PARITY : 0);
}

// Memory may be read and written at once or at the end; in the latter case, what was there is gone at once.
inline void copy_bulk(void* to, const void* from, unsigned bytes, Barrier* barrier) {
  if (((uintptr_t)to | (uintptr_t)from | bytes) % 16 || bytes == 0)
    emulator::fail("a copy of %u bytes from %p to %p", bytes, from, to);
  const size_t at = static_cast<unsigned char*>(to) - dynamic_shared();
  if (at + bytes > emulator::SHARED_BYTES) emulator::fail("a copy to byte %zu of shared memory", at);
  const bool early = emulator::random_below(2);
  if (early) memcpy(to, from, bytes);
  else memset(to, emulator::POISON, bytes);
  const unsigned late = emulator::random_below(8) == 0 ? emulator::random_below(200) : emulator::random_below(4);
  emulator::machine.copies.push_back(
      {static_cast<unsigned char*>(to), early ? nullptr : from, bytes, barrier, emulator::machine.round + late});
}

inline void copy_bulk_once(void* to, const void* from, unsigned bytes, Barrier* barrier) {
  copy_bulk(to, from, bytes, barrier);
}

inline void fence_copies() {}
