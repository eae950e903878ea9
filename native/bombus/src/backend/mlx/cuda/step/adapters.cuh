// What adapters add to a product: y += scale * (x a^T) b^T. Some warps make x a^T at the beginning of its phase, all
// blocks need it at the end.

__device__ inline Pair read_pair(int row, int layer, int place) {
  const word* own = reinterpret_cast<const word*>(planned(row)[1]);
  if (!own) return {};
  own += (layer * LORA_PAIRS + place) * 3;
  return {reinterpret_cast<const bf16*>(own[0]), reinterpret_cast<const bf16*>(own[1]), (int)(unsigned)own[2],
          __uint_as_float((unsigned)(own[2] >> 32))};
}

__device__ inline Pair& kept_pair(int row, int layer, int place) {
  return in_shared<Pair>(PAIRS)[(layer % 2 * ROWS + row) * LORA_PAIRS + place];
}

// With one tile, a warp reads all pairs of a layer while the layer before is computed.
__device__ inline void keep_pairs(int layer) {
  if (TILES > 1 || state().most_rank == 0) return;
#pragma unroll 1
  for (int i = lane(); i < rows() * LORA_PAIRS; i += 32)
    kept_pair(i / LORA_PAIRS, layer, i % LORA_PAIRS) = read_pair(i / LORA_PAIRS, layer, i % LORA_PAIRS);
}

__device__ inline Pair pair_of(int row, int layer, int place) {
  return TILES == 1 ? kept_pair(row, layer, place) : read_pair(row, layer, place);
}

__device__ inline float dot(uint4 x, uint4 y) {
  return low(x.x) * low(y.x) + high(x.x) * high(y.x) + low(x.y) * low(y.y) + high(x.y) * high(y.y) +
         low(x.z) * low(y.z) + high(x.z) * high(y.z) + low(x.w) * low(y.w) + high(x.w) * high(y.w);
}

// x a^T is made in pieces of so many inputs, each by a warp; those of a number lie MOST_RANK apart.
template <int K> struct Pieces {
  static constexpr int LENGTH = TILES == 1 && K > 1024 ? 1024 : K, COUNT = (K + LENGTH - 1) / LENGTH;
  static_assert(ROWS * COUNT <= MOST_ROWS, "room");
};

// How many there are in a phase.
template <int K> __device__ inline int shrinks_of(int parts) {
  return rows() * parts * state().most_rank * Pieces<K>::COUNT;
}

// Waits for x a^T, all lanes of a warp.
__device__ inline void wait_for_shrunk(unsigned target) {
  if (lane() == 0) wait_for(shrunk(), target);
  __syncwarp();
}

// x a^T for the rows that have an adapter, after the barrier that it waits for. What is needed besides x is asked for
// before. With one tile, those who finish make it, else those who multiply.
template <int K> __device__ __noinline__ void shrink(int layer, int place, int parts, const bf16* x) {
  constexpr int LENGTH = Pieces<K>::LENGTH, COUNT = Pieces<K>::COUNT, EACH = 4, CHUNK = EACH * 32;
  const int first = TILES == 1 ? WARPS : 0, step = gridDim.x * (COMPUTING - first);
  const int ranks = state().most_rank, each = parts * ranks * COUNT, tasks = rows() * each;
  // The first blocks have attention to make.
  const int own_first = gridDim.x - 1 - blockIdx.x + gridDim.x * (warp() - first);
  uint4 a[EACH];
  Pair own = {};
  const auto find = [&](int task) {
    own = {};
    if (task < tasks) own = pair_of(task / each, layer, place + task % each / (ranks * COUNT));
  };
  const auto read = [&](int task, int chunk) {
    const int r = task / COUNT % ranks, begin = task % COUNT * (LENGTH / 8);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int at = chunk + i * 32 + lane();
      a[i] = make_uint4(0, 0, 0, 0);
      if (r < own.rank && at < LENGTH / 8 && begin + at < K / 8)
        a[i] = reinterpret_cast<const uint4*>(own.a + (size_t)r * K)[begin + at];
    }
  };
  find(own_first);
  read(own_first, 0);
  wait_grid();
#pragma unroll 1
  for (int task = own_first; task < tasks; task += step) {
    const int row = task / each, begin = task % COUNT * (LENGTH / 8);
    float sum = 0.f;
#pragma unroll 1
    for (int chunk = 0; chunk < LENGTH / 8; chunk += CHUNK) {
      if (chunk > 0) read(task, chunk);
#pragma unroll
      for (int i = 0; i < EACH; i++) {
        const int at = chunk + i * 32 + lane();
        if (at < LENGTH / 8 && begin + at < K / 8)
          sum += dot(reinterpret_cast<const uint4*>(x)[placed(row, (begin + at) * 8, K) / 8], a[i]);
      }
    }
    sum = warp_sum(sum) * own.scale;
    if (lane() == 0) {
      const int part = task % each / (ranks * COUNT), r = task / COUNT % ranks, piece = task % COUNT;
      low_rank(row, part, COUNT)[piece * MOST_RANK + r] = sum;
      add_release(shrunk(), 1);
    }
    find(task + step);
    read(task + step, 0);
  }
}

// A row's pairs for a product's parts, and the first eight numbers of x a^T. Without parts, there is no adapter.
template <int K, int PARTS> struct Adapted {
  static constexpr int COUNT = Pieces<K>::COUNT;
  const bf16* b[PARTS + 1];
  int rank[PARTS + 1];
  float x[PARTS + 1][8];

  __device__ Adapted(int row, int layer, int place) {
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      const Pair own = row < rows() ? pair_of(row, layer, place + part) : Pair{};
      b[part] = own.b, rank[part] = own.rank;
    }
  }

  // Eight numbers of x a^T.
  __device__ static void read(float (&to)[8], int row, int part, int r) {
    const float* own = low_rank(row, part, COUNT) + r;
#pragma unroll
    for (int i = 0; i < 8; i++) to[i] = 0.f;
#pragma unroll 4
    for (int piece = 0; piece < COUNT; piece++) {
      const float4 one = *reinterpret_cast<const float4*>(own + piece * MOST_RANK);
      const float4 other = *reinterpret_cast<const float4*>(own + piece * MOST_RANK + 4);
      to[0] += one.x, to[1] += one.y, to[2] += one.z, to[3] += one.w;
      to[4] += other.x, to[5] += other.y, to[6] += other.z, to[7] += other.w;
    }
  }

  // Once they are there.
  __device__ void read(int row) {
#pragma unroll
    for (int part = 0; part < PARTS; part++)
      if (rank[part] > 0) read(x[part], row, part, 0);
  }
};

__device__ inline float dot(const float (&x)[8], uint4 y) {
  return x[0] * low(y.x) + x[1] * high(y.x) + x[2] * low(y.y) + x[3] * high(y.y) + x[4] * low(y.z) +
         x[5] * high(y.z) + x[6] * low(y.w) + x[7] * high(y.w);
}

// What a row's adapter adds to output n of a part: what there is before x a^T is, for the first eight of its rank.
struct Expansion {
  const bf16* b;
  int rank;
  uint4 first;

  template <int K, int PARTS>
  __device__ Expansion(const Adapted<K, PARTS>& adapted, int part, int n) : b(nullptr), rank(0) {
#pragma unroll
    for (int i = 0; i < PARTS; i++)
      if (i == part) rank = adapted.rank[i], b = adapted.b[i] + (size_t)n * adapted.rank[i];
    if (PARTS > 0 && rank > 0) first = *reinterpret_cast<const uint4*>(b);
  }

  template <int K, int PARTS> __device__ float times(const Adapted<K, PARTS>& adapted, int row, int part) const {
    if (PARTS == 0 || rank == 0) return 0.f;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < PARTS; i++)
      if (i == part) sum = dot(adapted.x[i], first);
#pragma unroll 1
    for (int r = 8; r < rank; r += 8) {
      float x[8];
      adapted.read(x, row, part, r);
      sum += dot(x, *reinterpret_cast<const uint4*>(b + r));
    }
    return sum;
  }
};
