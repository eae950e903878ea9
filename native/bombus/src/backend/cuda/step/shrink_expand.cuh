// Shrink and expand are the two halves of LoRA beside a product: what its outputs, as inputs of the next one, add to
// that one's x a^T, and what its own x a^T adds to its outputs. (The names are those of Punica, Chen et al., 2023.)
//
// A warp of the epilogue has 16 outputs (of gate and up eight) for four rows: a lane has outputs tile_row() and the
// one 8 further on, of row first + 2 * tile_column(). `Specialization` says how many rows there may be:
//   NONE           no row has an adapter: no code at all
//   ONE_ROW        on tensor cores; half as much code, and a single warp waits mostly for its instructions
//   ROWS_BY_LANES  each row may have its own adapter, so every lane multiplies for its own row
// The first eight of a rank are prefetched and stay in registers; what comes behind them is read when it is used.

enum Specialization { NONE, ONE_ROW, ROWS_BY_LANES };

__device__ inline uint4 eight_of(const LoraMatrix& matrix, int n, int rank) {
  if (rank >= matrix.rank) return make_uint4(0, 0, 0, 0);
  return *reinterpret_cast<const uint4*>(matrix.numbers + (unsigned)(n * matrix.rank + rank));
}
// Two of them: those of a lane's column of a tile.
__device__ inline unsigned own_two(const LoraMatrix& matrix, int n, int rank) {
  if (rank >= matrix.rank) return 0;
  return *reinterpret_cast<const unsigned*>(matrix.numbers + (unsigned)(n * matrix.rank + rank + 2 * tile_column()));
}

__device__ inline void add_times(float (&sums)[8], float x, uint4 a) {
  sums[0] += x * low(a.x), sums[1] += x * high(a.x), sums[2] += x * low(a.y), sums[3] += x * high(a.y);
  sums[4] += x * low(a.z), sums[5] += x * high(a.z), sums[6] += x * low(a.w), sums[7] += x * high(a.w);
}
__device__ inline float dot(const float (&x)[8], uint4 b) {
  return x[0] * low(b.x) + x[1] * high(b.x) + x[2] * low(b.y) + x[3] * high(b.y) + x[4] * low(b.z) + x[5] * high(b.z) +
         x[6] * low(b.w) + x[7] * high(b.w);
}

// Sums over the eight lanes that share a column of the tile: the lane of row r gets number r.
__device__ inline float reduce_column(const float (&sums)[8]) {
  float four[4], two[2];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const bool upper = lane() & 16;
    four[i] = (upper ? sums[i + 4] : sums[i]) + __shfl_xor_sync(0xffffffff, upper ? sums[i] : sums[i + 4], 16);
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const bool upper = lane() & 8;
    two[i] = (upper ? four[i + 2] : four[i]) + __shfl_xor_sync(0xffffffff, upper ? four[i] : four[i + 2], 8);
  }
  const bool upper = lane() & 4;
  return (upper ? two[1] : two[0]) + __shfl_xor_sync(0xffffffff, upper ? two[0] : two[1], 4);
}

__device__ inline void add_fixed(bool own, word* to, float sum) {
  if (own && sum != 0.f) add_relaxed(to, (word)__float2ll_rn(sum * FIXED));
}

// What comes behind the first eight of a rank. x: a lane's outputs, as bfloat16; n: the first.
__device__ __noinline__ static void shrink_more(int product, int row, int n, unsigned x, bool second) {
  const Product at(product);
#pragma unroll 1
  for (int index = 0; index < at.next.count; index++) {
    const LoraMatrix matrix = lora_a(at, row, index);
    word* to = own_low_rank(product + 1, row) + index * MOST_RANK + tile_row();
#pragma unroll 1
    for (int rank = 8; rank < state().most_rank; rank += 8) {
      float sums[8] = {};
      add_times(sums, low(x), eight_of(matrix, n, rank));
      if (second) add_times(sums, high(x), eight_of(matrix, n + 8, rank));
      const float sum = reduce_column(sums);
      add_fixed(matrix.rank > 0, to + rank, sum);
    }
  }
}

// What a warp's outputs, which are inputs of the next product, add to its x a^T: of a lane there are N.
template <Specialization SPECIAL, int N, int FUSED> struct Shrink {
  uint4 a[FUSED][N];  // for the first eight of the rank
  word* to;
  bool more;

  // Prefetches them, for outputs from n on: that is the lane's own first.
  __device__ void prefetch(const Product& at, int row, int n) {
#pragma unroll
    for (int index = 0; index < FUSED; index++) {
      const LoraMatrix matrix = lora_a(at, row, index);
#pragma unroll
      for (int i = 0; i < N; i++) a[index][i] = eight_of(matrix, n + i * 8, 0);
    }
  }
  __device__ void prepare(const Product& at, int row) {
    to = own_low_rank(at.number + 1, row) + tile_row();
    more = state().most_rank > 8;
  }

  // x: the lane's outputs, as bfloat16. All lanes come here; those of absent rows have no a.
  __device__ void add(const Product& at, int row, int n, unsigned x) const {
#pragma unroll
    for (int index = 0; index < FUSED; index++) {
      if (index >= at.next.count) break;
      float sums[8] = {};
      add_times(sums, low(x), a[index][0]);
      if (N == 2) add_times(sums, high(x), a[index][N - 1]);
      const float sum = reduce_column(sums);
      add_fixed(row < rows(), to + index * MOST_RANK, sum);
    }
    if (more) shrink_more(at.number, row, n, x, N == 2);
  }
};

template <int N, int FUSED> struct Shrink<ONE_ROW, N, FUSED> {
  unsigned a[FUSED][N];
  word* to;
  bool adds, more;

  __device__ void prefetch(const Product& at, int, int n) {
#pragma unroll
    for (int index = 0; index < FUSED; index++) {
      const LoraMatrix matrix = lora_a(at, 0, index);
#pragma unroll
      for (int i = 0; i < N; i++) a[index][i] = own_two(matrix, n + i * 8, 0);
    }
  }
  __device__ void prepare(const Product& at, int) {
#pragma unroll
    for (int index = 0; index < FUSED; index++)
#pragma unroll
      for (int i = 0; i < N; i++) a[index][i] = transpose(a[index][i]);
    // All rows of lanes have the same two sums of each layer: each row adds one.
    const int index = tile_row() / 2;
    to = own_low_rank(at.number + 1, 0) + index * MOST_RANK + 2 * tile_column() + tile_row() % 2;
    adds = index < FUSED && index < at.next.count;
    more = state().most_rank > 8;
  }

  __device__ void add(const Product& at, int row, int n, unsigned x) const {
    // The row's numbers are in the tile's first column.
    const int from = tile_column() * 8;
    const unsigned one = __shfl_sync(0xffffffff, x, from), other = __shfl_sync(0xffffffff, x, from + 4);
    const unsigned x0 = __byte_perm(one, other, 0x5410), x1 = __byte_perm(one, other, 0x7632);
    // Layers that are not there have an a of zeros, and zero times NaN is NaN.
    float sums[FUSED][2] = {};
#pragma unroll
    for (int index = 0; index < FUSED; index++)
      multiply_upper(sums[index], x0, N == 2 ? x1 : 0, a[index][0], N == 2 ? a[index][N - 1] : 0);
    float own[2] = {sums[0][0], sums[0][1]};
#pragma unroll
    for (int index = 1; index < FUSED; index++)
      if (tile_row() / 2 == index) own[0] = sums[index][0], own[1] = sums[index][1];
    add_fixed(adds, to, tile_row() % 2 ? own[1] : own[0]);
    if (more) shrink_more(at.number, row, n, x, N == 2);
  }
};

template <int N, int FUSED> struct Shrink<NONE, N, FUSED> {
  __device__ void prefetch(const Product&, int, int) {}
  __device__ void prepare(const Product&, int) {}
  __device__ void add(const Product&, int, int, unsigned) const {}
};

// What adapters add to a lane's two outputs: of one layer, or of two fused ones, the first and the one behind it.
template <Specialization SPECIAL, int FUSED> struct Expand {
  uint4 b[2];  // for the first eight of the rank
  float x[FUSED][8];

  // Prefetches b, which is there before x is.
  __device__ void prefetch(const Product& at, int row, int index, const int (&n)[2]) {
#pragma unroll
    for (int i = 0; i < 2; i++) b[i] = eight_of(lora_b(at.own, row, index + i * (FUSED - 1)), n[i], 0);
  }

  __device__ static void read(float (&x)[8], const Product& at, int row, int index, int rank) {
    const float scale = scale_of(at.own, row, index) / FIXED;
    const int there = min(row, rows() - 1), from = index * MOST_RANK + rank;
    const ulonglong2* one = reinterpret_cast<const ulonglong2*>(low_rank(at.number, 0, there) + from);
    const ulonglong2* other = reinterpret_cast<const ulonglong2*>(low_rank(at.number, 1, there) + from);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      x[2 * i] = (float)(long long)(one[i].x + other[i].x) * scale;
      x[2 * i + 1] = (float)(long long)(one[i].y + other[i].y) * scale;
    }
  }

  // Behind the barrier that x comes with.
  __device__ void load(const Product& at, int row, int index) {
#pragma unroll
    for (int i = 0; i < FUSED; i++) {
      if (TILES == 1) read(x[i], at, row, index + i, 0);
      else kept_low_rank(index + i, row).to(x[i]);
    }
  }
  __device__ void prepare(const Product&, int) {}

  __device__ float2 added(const Product& at, int row, int index, const int (&n)[2]) const {
    float2 y = make_float2(dot(x[0], b[0]), dot(x[FUSED - 1], b[1]));
    if (state().most_rank > 8) y.x += more(at.number, row, index, n[0]), y.y += more(at.number, row, index + FUSED - 1, n[1]);
    return y;
  }

  // What comes behind the first eight of a rank.
  __device__ __noinline__ static float more(int product, int row, int index, int n) {
    const Product at(product);
    const LoraMatrix matrix = lora_b(at.own, row, index);
    float sum = 0.f;
#pragma unroll 1
    for (int rank = 8; rank < matrix.rank; rank += 8) {
      float x[8];
      read(x, at, row, index, rank);
      sum += dot(x, eight_of(matrix, n, rank));
    }
    return sum;
  }
};

template <int FUSED> struct Expand<ONE_ROW, FUSED> {
  unsigned b[2];           // two of the rank each
  ulonglong2 from[FUSED];  // two numbers of a shard each
  unsigned x[FUSED];       // for the lanes of the tile's first row

  __device__ void prefetch(const Product& at, int, int index, const int (&n)[2]) {
#pragma unroll
    for (int i = 0; i < 2; i++) b[i] = own_two(lora_b(at.own, 0, index + i * (FUSED - 1)), n[i], 0);
  }

  // Each row of lanes has a shard.
  __device__ static ulonglong2 read(const Product& at, int index, int rank) {
    const word* own = low_rank(at.number, tile_row(), 0) + index * MOST_RANK + rank + 2 * tile_column();
    return *reinterpret_cast<const ulonglong2*>(own);
  }
  __device__ static unsigned join(const Product& at, int index, ulonglong2 two) {
    float2 own = make_float2((float)(long long)two.x, (float)(long long)two.y);
#pragma unroll
    for (int other = 4; other < 32; other *= 2) {
      own.x += __shfl_xor_sync(0xffffffff, own.x, other);
      own.y += __shfl_xor_sync(0xffffffff, own.y, other);
    }
    const float scale = scale_of(at.own, 0, index) / FIXED;
    return tile_row() == 0 ? pack_bf16(own.x * scale, own.y * scale) : 0;
  }

  __device__ void load(const Product& at, int, int index) {
#pragma unroll
    for (int i = 0; i < FUSED; i++) from[i] = read(at, index + i, 0);
  }
  __device__ void prepare(const Product& at, int index) {
#pragma unroll
    for (int i = 0; i < FUSED; i++) x[i] = join(at, index + i, from[i]);
  }

  __device__ static void add_eight(float (&all)[4], unsigned b0, unsigned b1, const unsigned (&x)[FUSED]) {
    if (FUSED == 1) multiply(all, b0, b1, 0, 0, x[0], 0);
    else multiply(all, b0, 0, 0, b1, x[0], x[FUSED - 1]);
  }

  __device__ float2 added(const Product& at, int, int index, const int (&n)[2]) const {
    float all[4] = {};
    add_eight(all, b[0], b[1], x);
    float2 y = make_float2(all[0], all[2]);
    if (state().most_rank > 8) {
      const float2 rest = more(at.number, index, n[0], n[1]);
      y.x += rest.x, y.y += rest.y;
    }
    return y;
  }

  __device__ __noinline__ static float2 more(int product, int index, int n0, int n1) {
    const Product at(product);
    const LoraMatrix first = lora_b(at.own, 0, index), second = lora_b(at.own, 0, index + FUSED - 1);
    float all[4] = {};
#pragma unroll 1
    for (int rank = 8; rank < state().most_rank; rank += 8) {
      unsigned x[FUSED];
#pragma unroll
      for (int i = 0; i < FUSED; i++) x[i] = join(at, index + i, read(at, index + i, rank));
      add_eight(all, own_two(first, n0, rank), own_two(second, n1, rank), x);
    }
    return make_float2(all[0], all[2]);
  }
};

template <int FUSED> struct Expand<NONE, FUSED> {
  __device__ void prefetch(const Product&, int, int, const int (&)[2]) {}
  __device__ void load(const Product&, int, int) {}
  __device__ void prepare(const Product&, int) {}
  __device__ float2 added(const Product&, int, int, const int (&)[2]) const { return make_float2(0.f, 0.f); }
};
