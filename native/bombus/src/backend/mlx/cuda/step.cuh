// One token for each of some sequences: the whole model in one launch.
//
// As many blocks as the card has multiprocessors stay for all phases, with a barrier after each: a
// launch for every phase would cost more than the phase. What the next phase will multiply with is
// brought into the card's cache before the barrier.
//
// A product with a weight of 4 bits is made on tensor cores: a block makes 16 outputs for all rows
// (`Step::project`), its warps share the inputs. Inputs are written by the phase before in the order in
// which the tensor cores want them (`placed`).

typedef unsigned short bf16;
typedef unsigned long long word;

constexpr int THREADS = 512, WARPS = THREADS / 32;
constexpr int GROUP = 64;   // of quantization
constexpr int PAGE = 64;    // positions in a page of keys and values
constexpr int MOST_SPLITS = 32;
constexpr int MOST_ROWS = 256;
constexpr int MOST_RANK = 64;
constexpr int TEAM = 128, TEAMS = THREADS / TEAM;
constexpr unsigned ONES = 0x3f803f80;
constexpr float LEAST = -3e38f;
constexpr unsigned PATIENCE = 1u << 23;

// What a product is for: its outputs one by one, a gate's beside what it lets through, or outputs that whole
// warps take, also those of rows that are not there.
enum Kind { SINGLE, GATED, WHOLE };

__device__ inline float low(unsigned two) { return __uint_as_float(two << 16); }
__device__ inline float high(unsigned two) { return __uint_as_float(two & 0xffff0000); }
__device__ inline float widen(bf16 x) { return __uint_as_float((unsigned)x << 16); }
__device__ inline bf16 narrow(float x) { return (bf16)pack_bf16(x, 0.f); }

// Two codes as bfloat16: 128 has the exponent at which the last bit of the mantissa is 1.
__device__ inline unsigned widened(unsigned codes, int shift) {
  return ((codes >> shift) & 0x000f000f) | 0x43004300;
}

// Where x[row][k] lies, so that a thread reads what it feeds to the tensor cores as 16 bytes: tiles of 8
// rows, groups of 64, halves, lanes, and 8 numbers in the order 0 4 1 5 2 6 3 7, which is that of the codes
// that `widened` takes out of a word.
__device__ inline size_t placed(int row, int k, int width) {
  const int lane = row % 8 * 4 + k % 64 / 16, i = k % 8;
  const size_t half = ((size_t)(row / 8) * (width / 64) + k / 64) * 2 + k % 16 / 8;
  return (half * 32 + lane) * 8 + i % 4 * 2 + i / 4;
}

__device__ inline float warp_sum(float x) {
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffff, x, lane);
  return x;
}

__device__ inline float warp_max(float x) {
  for (int lane = 16; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, lane));
  return x;
}

// A head, normed and rotated: lane l has the numbers l, l + 32, ... What is rotated together lies DIM / 2
// apart, as in mlx's fast.rope with traditional=False.
template <int DIM>
__device__ void norm_and_rotate(float (&x)[DIM / 32], const bf16* norm, int at, int lane, float eps, float theta) {
  float square = 0.f;
#pragma unroll
  for (int i = 0; i < DIM / 32; i++) square += x[i] * x[i];
  const float factor = rsqrtf(warp_sum(square) / DIM + eps);
#pragma unroll
  for (int i = 0; i < DIM / 32; i++) x[i] *= factor * widen(norm[lane + 32 * i]);
  theta = log2f(theta);
#pragma unroll
  for (int i = 0; i < DIM / 64; i++) {
    float sine, cosine;
    sincosf(at * exp2f(-theta * (lane + 32 * i) / (DIM / 2)), &sine, &cosine);
    const float one = x[i], other = x[i + DIM / 64];
    x[i] = one * cosine - other * sine;
    x[i + DIM / 64] = one * sine + other * cosine;
  }
}

// A weight of 4 bits in groups of 64: codes [N, K / 8], scales and biases [N, K / 64].
struct Matrix {
  const uint2* codes;
  const bf16* scales;
  const bf16* biases;
};

// What a lane multiplies of two groups: of two rows of the weight.
struct Piece {
  uint2 codes[2][2];
  bf16 scales[2][2], biases[2][2];
};

// An adapter's pair for one linear layer: a [rank, in] (its inputs in the order of `placed`), b [out, rank].
struct Pair {
  const bf16* a;
  const bf16* b;
  int rank;
  float scale;
};

// In the table of a model, for every layer; then come the head and its norm, and the embedding.
enum { QKV = 0, O = 3, GATE_UP = 6, DOWN = 9, INPUT_NORM = 12, POST_NORM, Q_NORM, K_NORM, LAYER_WORDS };
enum { HEAD = 0, NORM = 3, EMBEDDING = 4 };
// Where a projection's pairs are in an adapter's table: 3 words each, 7 pairs for every layer.
enum { LORA_QKV = 0, LORA_O = 3, LORA_GATE_UP = 4, LORA_DOWN = 6, LORA_PAIRS = 7 };

// `plan` has HEADER words: rows, words for a row, the highest rank of an adapter; and for every row: id and
// position, adapter, pages. The id is a token's, or -1 - the row of `sampled` that has it.
template <int TILES, int HIDDEN, int INNER, int HEADS, int KV_HEADS, int DIM, int LAYERS, int VOCAB,
          int EPS_BITS, int THETA_BITS>
struct Step {
  static constexpr int Q_WIDTH = HEADS * DIM, KV_WIDTH = KV_HEADS * DIM;
  static constexpr int QKV_WIDTH = Q_WIDTH + 2 * KV_WIDTH;
  static constexpr int SHARED = HEADS / KV_HEADS;  // query heads that share keys
  static constexpr int HEADS_AT_ONCE = SHARED < 4 ? SHARED : 4;
  static constexpr int ROWS = TILES * 8;           // at once
  static constexpr int HEADER = 4;
  static constexpr int PARTIAL = DIM + 2;          // attended, largest, sum

  const word* table;
  const word* plan;
  const unsigned* sampled;
  float* logits;
  int count, row_words, most_rank;

  // What lies where in the workspace: bytes.
  static constexpr size_t room(size_t bytes) { return (bytes + 255) / 256 * 256; }
  static constexpr size_t STAMPS = 256;
  static constexpr size_t ATTENDED = STAMPS + room(8 * (5 * LAYERS + 5));
  static constexpr size_t HIDDEN_AT = ATTENDED + room(4 * MOST_ROWS * KV_HEADS);
  static constexpr size_t SQUARES = HIDDEN_AT + room((size_t)4 * MOST_ROWS * HIDDEN);
  static constexpr size_t QKV_AT = SQUARES + room((size_t)4 * MOST_ROWS * (HIDDEN / 16));
  static constexpr size_t NORMED = QKV_AT + room((size_t)4 * MOST_ROWS * QKV_WIDTH);
  static constexpr size_t MIXED = NORMED + room((size_t)2 * MOST_ROWS * HIDDEN);
  static constexpr size_t ACTIVE = MIXED + room((size_t)2 * MOST_ROWS * Q_WIDTH);
  static constexpr size_t LOW_RANK = ACTIVE + room((size_t)2 * MOST_ROWS * INNER);
  static constexpr size_t SPLITS = LOW_RANK + room((size_t)4 * MOST_ROWS * 3 * MOST_RANK);

  unsigned char* workspace;
  template <class T> __device__ T* in_workspace(size_t at) const {
    return reinterpret_cast<T*>(workspace + at);
  }
  // at barriers; products with an adapter's a; whether something went wrong
  __device__ unsigned* arrived() const { return in_workspace<unsigned>(0); }
  __device__ unsigned* shrunk() const { return in_workspace<unsigned>(128); }
  __device__ unsigned* failed() const { return in_workspace<unsigned>(192); }
  // When it began and ended in nanoseconds, and in cycles when it began and every phase ended.
  __device__ word* stamps() const { return in_workspace<word>(STAMPS); }
  // [rows, kv heads]: splits that are done
  __device__ unsigned* attended() const { return in_workspace<unsigned>(ATTENDED); }
  // [rows, HIDDEN], [rows, HIDDEN / 16], [rows, QKV_WIDTH]
  __device__ float* hidden() const { return in_workspace<float>(HIDDEN_AT); }
  __device__ float* squares() const { return in_workspace<float>(SQUARES); }
  __device__ float* qkv() const { return in_workspace<float>(QKV_AT); }
  // inputs of products, as `placed`
  __device__ bf16* normed() const { return in_workspace<bf16>(NORMED); }
  __device__ bf16* mixed() const { return in_workspace<bf16>(MIXED); }
  __device__ bf16* active() const { return in_workspace<bf16>(ACTIVE); }
  // [rows, 3, MOST_RANK]
  __device__ float* low_rank() const { return in_workspace<float>(LOW_RANK); }
  // [rows, kv heads, splits, heads, PARTIAL]
  __device__ float* splits() const { return in_workspace<float>(SPLITS); }

  // Shared memory: 1 / root mean square of hidden [MOST_ROWS], where a row's attention begins among all
  // tasks [MOST_ROWS + 1], and the warps' sums [2][WARPS][TILES * 128], or the teams' own.
  __device__ float* factors() const { return reinterpret_cast<float*>(dynamic_shared()); }
  __device__ int* first_task() const { return reinterpret_cast<int*>(factors() + MOST_ROWS); }
  __device__ float* partial() const { return reinterpret_cast<float*>(first_task() + MOST_ROWS + 4); }

  unsigned barriers, shrinks;
  int phase;
  bool alive;
  int lane, warp, g, t;

  __device__ const word* planned(int row) const { return plan + HEADER + (size_t)row * row_words; }
  __device__ int position(int row) const { return (int)(planned(row)[0] >> 32); }
  __device__ static float eps() { return __uint_as_float((unsigned)EPS_BITS); }
  __device__ static int splits_of(int position) {
    const int pages = position / PAGE + 1;
    const int each = (pages + MOST_SPLITS - 1) / MOST_SPLITS;
    return (pages + each - 1) / each;
  }

  __device__ Matrix matrix(const word* at) const {
    return {reinterpret_cast<const uint2*>(at[0]), reinterpret_cast<const bf16*>(at[1]),
            reinterpret_cast<const bf16*>(at[2])};
  }

  __device__ void begin() {
    count = (int)plan[0], row_words = (int)plan[1], most_rank = (int)plan[2];
    barriers = shrinks = 0;
    phase = 2;
    if (blockIdx.x == 0 && threadIdx.x == 0) stamps()[0] = nanoseconds();
    stamp();
    alive = true;
    lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  }

  // Waits until a counter has come so far: only thread 0 knows whether it did.
  __device__ void wait_for(const unsigned* counter, unsigned target) {
    unsigned patience = PATIENCE;
    while (load_acquire(counter) < target) {
      if (--patience == 0 || load_acquire(failed())) {
        atomicAdd(failed(), 1u);
        alive = false;
        return;
      }
    }
  }

  __device__ void stamp() {
    if (blockIdx.x == 0 && threadIdx.x == 0) stamps()[phase] = clock64();
    phase++;
  }

  // All blocks wait for each other. Where one does not come (it never should), all give up.
  __device__ void barrier() {
    __syncthreads();
    barriers += gridDim.x;
    if (threadIdx.x == 0 && alive) {
      __threadfence();
      add_release(arrived(), 1);
      wait_for(arrived(), barriers);
      __threadfence();
    }
    stamp();
    __syncthreads();
  }

  __device__ void run() {
    if (threadIdx.x == 0 && load_acquire(failed())) alive = false;
    place_tasks();
    embed();
    for (int layer = 0; layer < LAYERS; layer++) {
      const word* own = table + layer * LAYER_WORDS;
      barrier();
      norm_factors();
      shrink<HIDDEN>(layer, LORA_QKV, 3, normed());
      project<HIDDEN, QKV_WIDTH, SINGLE>(
          matrix(own + QKV), normed(), [&](int row, int n0, int n1, float y0, float y1) {
            const int part0 = part_of(n0), part1 = part_of(n1);
            qkv()[(size_t)row * QKV_WIDTH + n0] =
                factors()[row] * (y0 + expand(row, layer, LORA_QKV, part0, n0 - start_of(part0)));
            qkv()[(size_t)row * QKV_WIDTH + n1] =
                factors()[row] * (y1 + expand(row, layer, LORA_QKV, part1, n1 - start_of(part1)));
          });
      fetch<Q_WIDTH, HIDDEN, SINGLE>(matrix(own + O), 2);
      barrier();
      attend(own, layer);
      fetch<HIDDEN, 2 * INNER, GATED>(matrix(own + GATE_UP), 3);
      barrier();
      shrink<Q_WIDTH>(layer, LORA_O, 1, mixed());
      const bf16* post_norm = reinterpret_cast<const bf16*>(own[POST_NORM]);
      project<Q_WIDTH, HIDDEN, WHOLE>(
          matrix(own + O), mixed(), [&](int row, int n0, int n1, float y0, float y1) {
            y0 += expand(row, layer, LORA_O, 0, n0);
            y1 += expand(row, layer, LORA_O, 0, n1);
            add_hidden(row, n0, n1, y0, y1, post_norm);
          });
      barrier();
      norm_factors();
      shrink<HIDDEN>(layer, LORA_GATE_UP, 2, normed());
      project<HIDDEN, 2 * INNER, GATED>(
          matrix(own + GATE_UP), normed(), [&](int row, int n, int, float gate, float up) {
            gate = factors()[row] * (gate + expand(row, layer, LORA_GATE_UP, 0, n));
            up = factors()[row] * (up + expand(row, layer, LORA_GATE_UP, 1, n));
            active()[placed(row, n, INNER)] = narrow(gate / (1.f + __expf(-gate)) * up);
          });
      fetch<INNER, HIDDEN, SINGLE>(matrix(own + DOWN), 2);
      barrier();
      shrink<INNER>(layer, LORA_DOWN, 1, active());
      const bool last = layer + 1 == LAYERS;
      const word* next = last ? table + LAYERS * LAYER_WORDS : own + LAYER_WORDS;
      const bf16* next_norm = reinterpret_cast<const bf16*>(next[last ? NORM : INPUT_NORM]);
      project<INNER, HIDDEN, WHOLE>(
          matrix(own + DOWN), active(), [&](int row, int n0, int n1, float y0, float y1) {
            y0 += expand(row, layer, LORA_DOWN, 0, n0);
            y1 += expand(row, layer, LORA_DOWN, 0, n1);
            add_hidden(row, n0, n1, y0, y1, next_norm);
          });
      if (last) fetch<HIDDEN, VOCAB, SINGLE>(matrix(next + HEAD), 3);
      else fetch<HIDDEN, QKV_WIDTH, SINGLE>(matrix(next + QKV), 3);
    }
    barrier();
    norm_factors();
    most_rank = 0;
    project<HIDDEN, VOCAB, SINGLE>(
        matrix(table + LAYERS * LAYER_WORDS + HEAD), normed(),
        [&](int row, int n0, int n1, float y0, float y1) {
          if (n0 < VOCAB) logits[(size_t)row * VOCAB + n0] = factors()[row] * y0;
          if (n1 < VOCAB) logits[(size_t)row * VOCAB + n1] = factors()[row] * y1;
        });
    leave();
  }

  // The last block to leave resets the counters for the next launch.
  __device__ void leave() {
    __syncthreads();
    stamp();
    if (threadIdx.x != 0) return;
    if (blockIdx.x == 0) stamps()[1] = nanoseconds();
    if (!alive) {
      for (int row = 0; row < count; row++) logits[(size_t)row * VOCAB] = __uint_as_float(0x7fc00000);
      return;
    }
    if (fetch_add(arrived(), 1) + 1 == barriers + gridDim.x) {
      *shrunk() = 0;
      *arrived() = 0;
    }
  }

  // Where the attention of every row begins among all tasks.
  __device__ void place_tasks() {
    if (threadIdx.x < MOST_ROWS && (int)threadIdx.x < count)
      first_task()[threadIdx.x + 1] = splits_of(position(threadIdx.x)) * KV_HEADS;
    __syncthreads();
    if (threadIdx.x == 0) {
      first_task()[0] = 0;
      for (int row = 0; row < count; row++) first_task()[row + 1] += first_task()[row];
    }
    __syncthreads();
  }

  // 1 / root mean square of every row; read after the next __syncthreads.
  __device__ void norm_factors() {
    for (int row = warp; row < count; row += WARPS) {
      float sum = 0.f;
      for (int i = lane; i < HIDDEN / 16; i += 32) sum += squares()[(size_t)row * (HIDDEN / 16) + i];
      sum = warp_sum(sum);
      if (lane == 0) factors()[row] = rsqrtf(sum / HIDDEN + eps());
    }
  }

  __device__ void embed() {
    const word* own = table + LAYERS * LAYER_WORDS;
    const Matrix weight = matrix(own + EMBEDDING);
    const bf16* norm = reinterpret_cast<const bf16*>(table[INPUT_NORM]);
    fetch<HIDDEN, QKV_WIDTH, SINGLE>(matrix(table + QKV), 3);
    for (int unit = blockIdx.x; unit < HIDDEN / 16; unit += gridDim.x) {
      for (int tile = warp / 2; tile * 8 < count; tile += WARPS / 2) {
        const int row = tile * 8 + 2 * t + warp % 2, n = unit * 16 + g;
        float x0 = 0.f, x1 = 0.f;
        if (row < count) {
          int id = (int)(unsigned)planned(row)[0];
          if (id < 0) id = (int)sampled[-1 - id];
          x0 = embedded(weight, id, n), x1 = embedded(weight, id, n + 8);
        }
        set_hidden(row, n, n + 8, x0, x1, norm);
      }
    }
  }

  __device__ float embedded(const Matrix& weight, int id, int n) const {
    const unsigned* codes = reinterpret_cast<const unsigned*>(weight.codes) + (size_t)id * (HIDDEN / 8);
    const size_t group = (size_t)id * (HIDDEN / GROUP) + n / GROUP;
    const float code = codes[n / 8] >> n % 8 * 4 & 15;
    return widen(narrow(code * widen(weight.scales[group]) + widen(weight.biases[group])));
  }

  __device__ void add_hidden(int row, int n0, int n1, float y0, float y1, const bf16* norm) {
    const float* own = hidden() + (size_t)row * HIDDEN;
    if (row < count) y0 += own[n0], y1 += own[n1];
    set_hidden(row, n0, n1, y0, y1, norm);
  }

  // All lanes of a warp come here, with the same 16 outputs, for 4 rows.
  __device__ void set_hidden(int row, int n0, int n1, float x0, float x1, const bf16* norm) {
    float square = x0 * x0 + x1 * x1;
    for (int other = 4; other < 32; other *= 2) square += __shfl_xor_sync(0xffffffff, square, other);
    if (row >= count) return;
    float* own = hidden() + (size_t)row * HIDDEN;
    own[n0] = x0, own[n1] = x1;
    normed()[placed(row, n0, HIDDEN)] = narrow(x0 * widen(norm[n0]));
    normed()[placed(row, n1, HIDDEN)] = narrow(x1 * widen(norm[n1]));
    if (g == 0) squares()[(size_t)row * (HIDDEN / 16) + n0 / 16] = square;
  }

  // The rows of a weight that unit `unit` makes: of gate and up eight each, else sixteen.
  template <int N, Kind KIND>
  __device__ static void weight_rows(int unit, int g, int& n0, int& n1) {
    n0 = KIND == GATED ? unit * 8 + g : unit * 16 + g;
    n1 = KIND == GATED ? n0 + N / 2 : n0 + 8;
    if (N % 16 != 0) n0 = min(n0, N - 1), n1 = min(n1, N - 1);
  }

  // Brings this block's first units of a weight into the card's cache.
  template <int K, int N, Kind KIND>
  __device__ void fetch(const Matrix& w, int units) {
    constexpr int LINES = (K / 2 + 127) / 128, SMALL = (K / 32 + 127) / 128;
    for (int i = 0; i < units; i++) {
      const int unit = blockIdx.x + i * gridDim.x;
      if (unit >= (N + 15) / 16) return;
      for (int at = threadIdx.x; at < 16 * (LINES + 2 * SMALL); at += THREADS) {
        int n0, n1;
        weight_rows<N, KIND>(unit, at % 8, n0, n1);
        const size_t n = at % 16 < 8 ? n0 : n1;
        const int line = at / 16;
        if (line < LINES) prefetch(reinterpret_cast<const char*>(w.codes) + n * (K / 2) + line * 128);
        else if (line < LINES + SMALL)
          prefetch(reinterpret_cast<const char*>(w.scales) + n * (K / 32) + (line - LINES) * 128);
        else prefetch(reinterpret_cast<const char*>(w.biases) + n * (K / 32) + (line - LINES - SMALL) * 128);
      }
    }
  }

  // step: 128 inputs
  template <int K, int N, Kind KIND>
  __device__ void load(Piece& piece, const Matrix& w, int unit, int step) const {
    constexpr int GROUPS = K / GROUP;
    int n[2];
    weight_rows<N, KIND>(unit, g, n[0], n[1]);
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
      for (int u = 0; u < 2; u++) {
        const int group = step * 2 + u;
        if (GROUPS % 2 == 0 || group < GROUPS) {
          piece.codes[r][u] = __ldcs(w.codes + (size_t)n[r] * (K / 16) + group * 4 + t);
          if (GROUPS % 2) {
            piece.scales[r][u] = __ldg(w.scales + (size_t)n[r] * GROUPS + group);
            piece.biases[r][u] = __ldg(w.biases + (size_t)n[r] * GROUPS + group);
          }
        }
      }
      if (GROUPS % 2 == 0) {
        const size_t two = ((size_t)n[r] * GROUPS + step * 2) / 2;
        const unsigned scales = __ldg(reinterpret_cast<const unsigned*>(w.scales) + two);
        const unsigned biases = __ldg(reinterpret_cast<const unsigned*>(w.biases) + two);
        piece.scales[r][0] = (bf16)scales, piece.scales[r][1] = (bf16)(scales >> 16);
        piece.biases[r][0] = (bf16)biases, piece.biases[r][1] = (bf16)(biases >> 16);
      }
    }
  }

  // x: the first tile of these rows
  template <int K>
  __device__ void accumulate(
      float (&sums)[TILES][4], const Piece& piece, const uint4* x, int step, int rows_here) const {
#pragma unroll
    for (int u = 0; u < 2; u++) {
      const int group = step * 2 + u;
      if (K / GROUP % 2 && group >= K / GROUP) continue;
      const uint2 c0 = piece.codes[0][u], c1 = piece.codes[1][u];
      float scale[2], bias[2];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        scale[r] = widen(piece.scales[r][u]);
        bias[r] = widen(piece.biases[r][u]) - 128.f * scale[r];
      }
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        const uint4* own = x + ((size_t)tile * (K / 64) + group) * 64 + lane;
        uint4 v[2] = {};
        if (tile * 8 + g < rows_here) v[0] = own[0], v[1] = own[32];
        float dots[4] = {}, total[4] = {};
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const unsigned a = half ? c0.y : c0.x, b = half ? c1.y : c1.x;
          multiply(dots, widened(a, 0), widened(b, 0), widened(a, 4), widened(b, 4), v[half].x, v[half].y);
          multiply(total, ONES, ONES, ONES, ONES, v[half].x, v[half].y);
          multiply(dots, widened(a, 8), widened(b, 8), widened(a, 12), widened(b, 12), v[half].z, v[half].w);
          multiply(total, ONES, ONES, ONES, ONES, v[half].z, v[half].w);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) sums[tile][i] += scale[i / 2] * dots[i] + bias[i / 2] * total[i];
      }
    }
  }

  // y = x w^T; `finish` gets a row, two outputs of it and their numbers.
  template <int K, int N, Kind KIND, class Finish>
  __device__ void project(const Matrix w, const bf16* x, Finish finish) {
    constexpr int STEPS = (K / GROUP + 1) / 2, UNITS = (N + 15) / 16;
    const int batches = (count + ROWS - 1) / ROWS;
    const uint4* tiles = reinterpret_cast<const uint4*>(x);
    // Blocks go through (unit, batch of rows) and warps through the steps of each; one piece is loaded
    // ahead.
    int unit = blockIdx.x, batch = 0, parity = 0;
    Piece next;
    if (unit < UNITS && warp < STEPS) load<K, N, KIND>(next, w, unit, warp);
    while (unit < UNITS) {
      const int rows_here = min(count - batch * ROWS, ROWS);
      const uint4* own = tiles + (size_t)batch * TILES * (K / 64) * 64;
      const int unit_after = batch + 1 < batches ? unit : unit + gridDim.x;
      float sums[TILES][4] = {};
      for (int step = warp; step < STEPS; step += WARPS) {
        const Piece piece = next;
        if (step + WARPS < STEPS) load<K, N, KIND>(next, w, unit, step + WARPS);
        else if (unit_after < UNITS) load<K, N, KIND>(next, w, unit_after, warp);
        accumulate<K>(sums, piece, own, step, rows_here);
      }
      float* mine = partial() + parity * WARPS * TILES * 128 + warp * TILES * 128;
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int i = 0; i < 4; i++) mine[tile * 128 + i * 32 + lane] = sums[tile][i];
      if (threadIdx.x == 0 && alive && most_rank > 0) wait_for(shrunk(), shrinks);
      __syncthreads();
      if (warp < 2 * TILES) {
        const int tile = warp / 2, b = warp % 2;
        const float* sum = partial() + parity * WARPS * TILES * 128 + tile * 128 + b * 32 + lane;
        float y0 = 0.f, y1 = 0.f;
#pragma unroll
        for (int part = 0; part < WARPS; part++) {
          y0 += sum[part * TILES * 128];
          y1 += sum[part * TILES * 128 + 64];
        }
        const int row = batch * ROWS + tile * 8 + 2 * t + b;
        const int n0 = KIND == GATED ? unit * 8 + g : unit * 16 + g, n1 = KIND == GATED ? n0 : n0 + 8;
        // Which rows there are, `finish` asks itself where its warp must stay together.
        if (row < count || KIND == WHOLE) finish(row, n0, n1, y0, y1);
      }
      parity ^= 1;
      batch = batch + 1 < batches ? batch + 1 : 0;
      unit = unit_after;
    }
  }

  __device__ static int part_of(int n) { return n < Q_WIDTH ? 0 : n < Q_WIDTH + KV_WIDTH ? 1 : 2; }
  __device__ static int start_of(int part) {
    return part == 0 ? 0 : part == 1 ? Q_WIDTH : Q_WIDTH + KV_WIDTH;
  }

  __device__ Pair pair(int row, int layer, int place) const {
    const word* own = row < count ? reinterpret_cast<const word*>(planned(row)[1]) : nullptr;
    if (!own) return {nullptr, nullptr, 0, 0.f};
    own += (layer * LORA_PAIRS + place) * 3;
    return {reinterpret_cast<const bf16*>(own[0]), reinterpret_cast<const bf16*>(own[1]),
            (int)(unsigned)own[2], __uint_as_float((unsigned)(own[2] >> 32))};
  }

  // x a^T for the rows that have an adapter: one warp for each number.
  template <int K>
  __device__ void shrink(int layer, int place, int parts, const bf16* x) {
    if (most_rank == 0) return;
    const int tasks = count * parts * most_rank;
    for (int task = blockIdx.x + gridDim.x * warp; task < tasks; task += gridDim.x * WARPS) {
      const int row = task / (parts * most_rank), part = task / most_rank % parts, r = task % most_rank;
      const Pair own = pair(row, layer, place + part);
      if (r < own.rank) {
        const uint4* a = reinterpret_cast<const uint4*>(own.a + (size_t)r * K);
        float sum = 0.f;
#pragma unroll 4
        for (int i = lane; i < K / 8; i += 32) {
          const uint4 v = reinterpret_cast<const uint4*>(x)[placed(row, i * 8, K) / 8], c = a[i];
          sum += low(v.x) * low(c.x) + high(v.x) * high(c.x) + low(v.y) * low(c.y) + high(v.y) * high(c.y);
          sum += low(v.z) * low(c.z) + high(v.z) * high(c.z) + low(v.w) * low(c.w) + high(v.w) * high(c.w);
        }
        sum = warp_sum(sum);
        if (lane == 0) low_rank()[(size_t)row * 3 * MOST_RANK + part * MOST_RANK + r] = sum * own.scale;
      }
      __syncwarp();
      if (lane == 0) add_release(shrunk(), 1);
    }
    shrinks += tasks;
  }

  // What a row's adapter adds to output n of a part.
  __device__ float expand(int row, int layer, int place, int part, int n) const {
    if (most_rank == 0) return 0.f;
    const Pair own = pair(row, layer, place + part);
    const float* x = low_rank() + (size_t)row * 3 * MOST_RANK + part * MOST_RANK;
    const bf16* b = own.b + (size_t)n * own.rank;
    float sum = 0.f;
    for (int r = 0; r < own.rank; r++) sum += x[r] * widen(b[r]);
    return sum;
  }

  // A team's memory.
  struct Team {
    float q[SHARED][DIM];
    float scores[HEADS_AT_ONCE][PAGE];
    float largest[HEADS_AT_ONCE], sum[HEADS_AT_ONCE], fade[HEADS_AT_ONCE];
    float values[TEAM / (DIM / 8)][HEADS_AT_ONCE][DIM];
    unsigned last;
  };

  __device__ void norm_and_rotate(float (&x)[DIM / 32], const word norm, int at) const {
    ::norm_and_rotate<DIM>(x, reinterpret_cast<const bf16*>(norm), at, lane, eps(),
                           __uint_as_float((unsigned)THETA_BITS));
  }

  __device__ void read_head(float (&x)[DIM / 32], int row, int first) const {
#pragma unroll
    for (int i = 0; i < DIM / 32; i++) x[i] = qkv()[(size_t)row * QKV_WIDTH + first + lane + 32 * i];
  }

  __device__ bf16* page(int row, int index, int layer, int kind, int head) const {
    bf16* start = reinterpret_cast<bf16*>(planned(row)[2 + index]);
    return start + (size_t)((layer * 2 + kind) * KV_HEADS + head) * PAGE * DIM;
  }

  // Tasks: a row, a head of keys and values, and some of its pages. Whoever is the last of a row's head
  // joins what all found.
  __device__ void attend(const word* own, int layer) {
    const int team = threadIdx.x / TEAM, thread = threadIdx.x % TEAM, team_warp = thread / 32;
    Team& memory = reinterpret_cast<Team*>(partial())[team];
    const int tasks = first_task()[count];
    int row = 0;
    for (int task = blockIdx.x + gridDim.x * team; task < tasks; task += gridDim.x * TEAMS) {
      while (task >= first_task()[row + 1]) row++;
      const int head = (task - first_task()[row]) % KV_HEADS, split = (task - first_task()[row]) / KV_HEADS;
      const int at = position(row), all = splits_of(at), pages = at / PAGE + 1;
      const int each = (pages + MOST_SPLITS - 1) / MOST_SPLITS;
      const int first = split * each, end = min(first + each, pages);
      float x[DIM / 32];
      for (int i = team_warp; i < SHARED; i += TEAM / 32) {
        read_head(x, row, (head * SHARED + i) * DIM);
        norm_and_rotate(x, own[Q_NORM], at);
#pragma unroll
        for (int j = 0; j < DIM / 32; j++) memory.q[i][lane + 32 * j] = x[j] * rsqrtf((float)DIM) * 1.44269504f;
      }
      if (split == all - 1 && team_warp >= 2) {
        const int kind = team_warp - 2;
        read_head(x, row, Q_WIDTH + kind * KV_WIDTH + head * DIM);
        if (kind == 0) norm_and_rotate(x, own[K_NORM], at);
        bf16* to = page(row, at / PAGE, layer, kind, head) + at % PAGE * DIM;
#pragma unroll
        for (int j = 0; j < DIM / 32; j++) to[lane + 32 * j] = narrow(x[j]);
      }
      team_sync(team, TEAM);
      for (int i = 0; i < SHARED; i += HEADS_AT_ONCE)
        attend_heads(memory, team, thread, row, head, i, split, all, first, end, at, layer);
      if (all > 1) join(memory, team, thread, row, head, all);
      team_sync(team, TEAM);
    }
  }

  __device__ float* split_at(int row, int head, int split, int shared) const {
    return splits() +
           ((((size_t)row * KV_HEADS + head) * MOST_SPLITS + split) * SHARED + shared) * PARTIAL;
  }

  // Some of the query heads that share keys, over pages first..end.
  __device__ void attend_heads(Team& memory, int team, int thread, int row, int head, int shared, int split,
                               int all, int first, int end, int at, int layer) {
    constexpr int SLICE = DIM / 8, SUBSETS = TEAM / SLICE, OWN = PAGE / SUBSETS;
    const int heads = min(SHARED - shared, HEADS_AT_ONCE);
    const int team_warp = thread / 32;
    // Keys: eight lanes share one, each has DIM / 8 of its numbers.
    const int eighth = lane % 8;
    // Values: DIM / 8 threads share one, each has 8 of its numbers.
    const int subset = thread / SLICE, column = thread % SLICE * 8;
    float sums[HEADS_AT_ONCE][8] = {};
    if (thread < HEADS_AT_ONCE) memory.largest[thread] = LEAST, memory.sum[thread] = 0.f;
    for (int p = first; p < end; p++) {
      const int seen = min(at + 1 - p * PAGE, PAGE);
      const bf16* k = page(row, p, layer, 0, head) + eighth * SLICE;
      const bf16* v = page(row, p, layer, 1, head) + column;
      const int key = team_warp * (PAGE / 4) + lane / 8;
      uint4 keys[PAGE / 16][SLICE / 8], values[OWN];
#pragma unroll
      for (int i = 0; i < PAGE / 16; i++)
#pragma unroll
        for (int j = 0; j < SLICE / 8; j++) {
          keys[i][j] = make_uint4(0, 0, 0, 0);
          if (key + i * 4 < seen) keys[i][j] = reinterpret_cast<const uint4*>(k + (key + i * 4) * DIM)[j];
        }
#pragma unroll
      for (int h = 0; h < HEADS_AT_ONCE; h++) {
        if (h >= heads) continue;
        float dots[PAGE / 16] = {};
#pragma unroll
        for (int j = 0; j < SLICE / 8; j++) {
          float q[8];
#pragma unroll
          for (int c = 0; c < 8; c++) q[c] = memory.q[shared + h][eighth * SLICE + j * 8 + c];
#pragma unroll
          for (int i = 0; i < PAGE / 16; i++) {
            const unsigned two[4] = {keys[i][j].x, keys[i][j].y, keys[i][j].z, keys[i][j].w};
#pragma unroll
            for (int c = 0; c < 4; c++) dots[i] += q[c * 2] * low(two[c]) + q[c * 2 + 1] * high(two[c]);
          }
        }
#pragma unroll
        for (int i = 0; i < PAGE / 16; i++) {
          float dot = dots[i];
          for (int other = 1; other < 8; other *= 2) dot += __shfl_xor_sync(0xffffffff, dot, other);
          if (eighth == 0) memory.scores[h][key + i * 4] = key + i * 4 < seen ? dot : LEAST;
        }
      }
#pragma unroll
      for (int i = 0; i < OWN; i++) {
        values[i] = make_uint4(0, 0, 0, 0);
        const int value = i * SUBSETS + subset;
        if (value < seen) values[i] = *reinterpret_cast<const uint4*>(v + value * DIM);
      }
      team_sync(team, TEAM);
      if (team_warp < heads) {
        float* scores = memory.scores[team_warp];
        const float one = scores[lane], other = scores[lane + 32], before = memory.largest[team_warp];
        const float largest = fmaxf(before, warp_max(fmaxf(one, other)));
        const float p0 = exp2f(one - largest), p1 = exp2f(other - largest);
        scores[lane] = p0, scores[lane + 32] = p1;
        const float sum = warp_sum(p0 + p1);
        if (lane == 0) {
          const float fade = exp2f(before - largest);
          memory.fade[team_warp] = fade;
          memory.largest[team_warp] = largest;
          memory.sum[team_warp] = memory.sum[team_warp] * fade + sum;
        }
      }
      team_sync(team, TEAM);
#pragma unroll
      for (int h = 0; h < HEADS_AT_ONCE; h++) {
        if (h >= heads) continue;
        const float fade = memory.fade[h];
#pragma unroll
        for (int c = 0; c < 8; c++) sums[h][c] *= fade;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
          const float share = memory.scores[h][i * SUBSETS + subset];
          const unsigned two[4] = {values[i].x, values[i].y, values[i].z, values[i].w};
#pragma unroll
          for (int c = 0; c < 4; c++) {
            sums[h][c * 2] += share * low(two[c]);
            sums[h][c * 2 + 1] += share * high(two[c]);
          }
        }
      }
      team_sync(team, TEAM);
    }
#pragma unroll
    for (int h = 0; h < HEADS_AT_ONCE; h++)
#pragma unroll
      for (int c = 0; c < 8; c++) memory.values[subset][h][column + c] = sums[h][c];
    team_sync(team, TEAM);
    for (int i = thread; i < heads * DIM; i += TEAM) {
      const int h = i / DIM, d = i % DIM;
      float sum = 0.f;
#pragma unroll
      for (int s = 0; s < SUBSETS; s++) sum += memory.values[s][h][d];
      if (all == 1) {
        mixed()[placed(row, (head * SHARED + shared + h) * DIM + d, Q_WIDTH)] = narrow(sum / memory.sum[h]);
      } else {
        float* own = split_at(row, head, split, shared + h);
        own[d] = sum;
        if (d == 0) own[DIM] = memory.largest[h], own[DIM + 1] = memory.sum[h];
      }
    }
    team_sync(team, TEAM);
  }

  __device__ void join(Team& memory, int team, int thread, int row, int head, int all) {
    __threadfence();
    team_sync(team, TEAM);
    unsigned* done = attended() + row * KV_HEADS + head;
    if (thread == 0) memory.last = fetch_add(done, 1) + 1 == (unsigned)all;
    team_sync(team, TEAM);
    if (!memory.last) return;
    if (thread == 0) *done = 0;
    __threadfence();
    for (int i = thread; i < SHARED * DIM; i += TEAM) {
      const int h = i / DIM, d = i % DIM;
      float largest = LEAST, sum = 0.f, total = 0.f;
      for (int s = 0; s < all; s++) largest = fmaxf(largest, split_at(row, head, s, h)[DIM]);
      for (int s = 0; s < all; s++) {
        const float* own = split_at(row, head, s, h);
        const float share = exp2f(own[DIM] - largest);
        sum += share * own[d];
        total += share * own[DIM + 1];
      }
      mixed()[placed(row, (head * SHARED + h) * DIM + d, Q_WIDTH)] = narrow(sum / total);
    }
  }
};
