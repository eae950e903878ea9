// What adapters add to a product: y += scale * (x a^T) b^T. Some blocks make x a^T at the beginning of its phase, all
// need it at the end.

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

// Inputs and outputs of the layers that the pairs are for.
__device__ inline int inputs_of(int place) {
  return place == LORA_O ? Q_WIDTH : place == LORA_DOWN ? INNER : HIDDEN;
}
__device__ inline int outputs_of(int place) {
  if (place == LORA_QKV) return Q_WIDTH;
  return place < LORA_O ? KV_WIDTH : place == LORA_O || place == LORA_DOWN ? HIDDEN : INNER;
}

// Brings a block's share of the pairs from a place on, which a phase ahead will need, into the card's cache: the weights
// that come all the time would else make them wait.
__device__ __noinline__ static void bring_pairs(int layer, int place, int parts) {
  const int first = blockIdx.x + gridDim.x * lane(), step = gridDim.x * 32;
#pragma unroll 1
  for (int i = 0; i < rows() * parts; i++) {
    const int at = place + i % parts;
    const Pair own = kept_pair(i / parts, layer, at);
#pragma unroll 1
    for (int line = first; line < inputs_of(at) * own.rank / 64; line += step) prefetch(own.a + (size_t)line * 64);
#pragma unroll 1
    for (int line = first; line < outputs_of(at) * own.rank / 64; line += step) prefetch(own.b + (size_t)line * 64);
  }
}

// Those of the phase after one: the next layer's are kept while attention is made.
__device__ inline void bring_next_pairs(int layer, int place) {
  if (place == LORA_QKV) bring_pairs(layer, LORA_O, 1);
  else if (place == LORA_O) bring_pairs(layer, LORA_GATE_UP, 2);
  else if (place == LORA_GATE_UP) bring_pairs(layer, LORA_DOWN, 1);
  else if (layer + 1 < LAYERS) bring_pairs(layer + 1, LORA_QKV, 3);
}

// With more tiles, all threads read what expands before the barrier of its phase.
__device__ inline Expander& kept_expander(int row, int part) { return in_shared<Expander>(PAIRS)[row * 3 + part]; }

__device__ inline void keep_expanders(int layer, int place, int parts) {
#pragma unroll 1
  for (int i = threadIdx.x; i < rows() * parts; i += THREADS) {
    const Pair own = read_pair(i / parts, layer, place + i % parts);
    kept_expander(i / parts, i % parts) = {own.b, own.rank};
  }
}

__device__ inline Expander expander_of(int row, int layer, int place, int part) {
  if (row >= rows()) return {};
  if (TILES > 1) return kept_expander(row, part);
  const Pair own = kept_pair(row, layer, place + part);
  return {own.b, own.rank};
}

__device__ inline float dot(uint4 x, uint4 y) {
  return low(x.x) * low(y.x) + high(x.x) * high(y.x) + low(x.y) * low(y.y) + high(x.y) * high(y.y) +
         low(x.z) * low(y.z) + high(x.z) * high(y.z) + low(x.w) * low(y.w) + high(x.w) * high(y.w);
}

// Each number of x a^T is written together with the phase that it is of, so that who waits for it waits for nothing
// else.
__device__ inline unsigned phase_of(int layer, int place, int part) {
  return (state().launch * LAYERS + layer) * LORA_PAIRS + place + part;
}

// Eight of them.
struct Eight {
  float numbers[8];

  __device__ void read(const word* from, unsigned phase) {
    unsigned patience = PATIENCE;
    bool there;
    do {
      there = true;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const word own = load_relaxed(from + i);
        numbers[i] = __uint_as_float((unsigned)own);
        there &= (unsigned)(own >> 32) == phase;
      }
    } while (!there && --patience);
    if (!there) atomicAdd(failed(), 1u);
  }

  __device__ float times(uint4 y) const {
    return numbers[0] * low(y.x) + numbers[1] * high(y.x) + numbers[2] * low(y.y) + numbers[3] * high(y.y) +
           numbers[4] * low(y.z) + numbers[5] * high(y.z) + numbers[6] * low(y.w) + numbers[7] * high(y.w);
  }
};

// x a^T for the rows that have an adapter, after the barrier that it waits for: a block for each number, up to 16 at
// once. What is needed besides x is asked for before.
template <int K> __device__ __noinline__ void shrink(int layer, int place, int parts, const bf16* x) {
  constexpr int EACH = (K / 8 + THREADS - 1) / THREADS;
  const int ranks = state().most_rank, tasks = rows() * parts * ranks, step = gridDim.x;
  float* found = in_shared<float>(SHRUNK);  // [WARPS, WARPS]
  uint4 a[EACH];
  float scale = 0.f;
  const auto read = [&](int task) {
    if (task >= tasks) return;
    const int row = task / (parts * ranks), part = task / ranks % parts, r = task % ranks;
    const Pair own = pair_of(row, layer, place + part);
    scale = own.scale;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int at = i * THREADS + threadIdx.x;
      a[i] = make_uint4(0, 0, 0, 0);
      if (r < own.rank && at < K / 8) a[i] = reinterpret_cast<const uint4*>(own.a + (size_t)r * K)[at];
    }
  };
  if (TILES > 1) keep_expanders(layer, place, parts);
  const int own_first = step - 1 - blockIdx.x;  // the first blocks have attention to make
  read(own_first);
  wait_inputs_here();
#pragma unroll 1
  for (int first = own_first; first < tasks; first += WARPS * step) {
#pragma unroll 1
    for (int i = 0, task = first; i < WARPS && task < tasks; i++, task += step) {
      const int row = task / (parts * ranks);
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < EACH; i++) {
        const int at = i * THREADS + threadIdx.x;
        if (at < K / 8) sum += dot(reinterpret_cast<const uint4*>(x)[placed(row, at * 8, K) / 8], a[i]);
      }
      sum = warp_sum(sum) * scale;
      if (lane() == 0) found[i * WARPS + warp()] = sum;
      read(task + step);
    }
    sync_multipliers();
    const int task = first + warp() * step;
    if (task < tasks) {
      const float sum = warp_sum(lane() < WARPS ? found[warp() * WARPS + lane()] : 0.f);
      const int row = task / (parts * ranks), part = task / ranks % parts;
      const word phase = (word)phase_of(layer, place, part) << 32;
      if (lane() == 0) store_relaxed(low_rank(row, part) + task % ranks, phase | __float_as_uint(sum));
    }
    if (first + WARPS * step < tasks) sync_multipliers();
  }
}

// What comes behind the first eight of a rank.
__device__ __noinline__ static float expand_more(const bf16* b, const word* x, int rank, unsigned phase) {
  float sum = 0.f;
#pragma unroll 1
  for (int r = 8; r < rank; r += 8) {
    Eight eight;
    eight.read(x + r, phase);
    sum += eight.times(*reinterpret_cast<const uint4*>(b + r));
  }
  return sum;
}

// A row's pairs for a product's parts, and the first eight numbers of x a^T. Without parts, there is no adapter.
template <int PARTS> struct Adapted {
  unsigned phase;
  const bf16* b[PARTS + 1];
  int rank[PARTS + 1];
  Eight x[PARTS + 1];

  __device__ Adapted(int row, int layer, int place) : phase(phase_of(layer, place, 0)) {
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      const Expander own = expander_of(row, layer, place, part);
      b[part] = own.b, rank[part] = (int)own.rank;
    }
  }

  // Waits for them.
  __device__ void read(int row) {
#pragma unroll
    for (int part = 0; part < PARTS; part++)
      if (rank[part] > 0) x[part].read(low_rank(row, part), phase + part);
  }
};

// What a row's adapter adds to output n of a part: what there is before x a^T is, for the first eight of its rank.
struct Expansion {
  const bf16* b;
  int rank;
  uint4 first;

  template <int PARTS> __device__ Expansion(const Adapted<PARTS>& adapted, int part, int n) : b(nullptr), rank(0) {
#pragma unroll
    for (int i = 0; i < PARTS; i++)
      if (i == part) rank = adapted.rank[i], b = adapted.b[i] + (size_t)n * adapted.rank[i];
    if (PARTS > 0 && rank > 0) first = *reinterpret_cast<const uint4*>(b);
  }

  template <int PARTS> __device__ float times(const Adapted<PARTS>& adapted, int row, int part) const {
    if (PARTS == 0 || rank == 0) return 0.f;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < PARTS; i++)
      if (i == part) sum = adapted.x[i].times(first);
    if (rank > 8) sum += expand_more(b, low_rank(row, part), rank, adapted.phase + part);
    return sum;
  }
};
