// One token for each of some sequences: the whole model in one launch.
//
// As many blocks as the card has multiprocessors stay for all phases, with a barrier after each: a
// launch for every phase would cost more than the phase. Weights come into shared memory ahead of their use,
// over the barriers: they wait for nobody.
//
// A product with a weight of 4 bits is made on tensor cores: a block makes 16 or 32 outputs for all rows
// (`Step::project`), its warps share the inputs. Inputs are written by the phase before in the order in
// which the tensor cores want them (`placed`).

constexpr int THREADS = 512, WARPS = THREADS / 32;
constexpr int GROUP = 64;   // of quantization
constexpr int MOST_SPLITS = 32;
constexpr int MOST_ROWS = 256;
constexpr int MOST_RANK = 64;
constexpr int TEAM = 128, TEAMS = THREADS / TEAM;
constexpr int STAGES = 4;  // of weights in shared memory, all but one on their way
constexpr int STAGE_BYTES = 38912;
constexpr unsigned ONES = 0x3f803f80;
constexpr unsigned PATIENCE = 1u << 23;

// What a product is for: its outputs one by one, a gate's beside what it lets through, or outputs that whole
// warps take, also those of rows that are not there.
enum Kind { SINGLE, GATED, WHOLE };

constexpr int largest_divisor(int n, int most) {
  return most >= n ? n : n % most == 0 ? most : largest_divisor(n, most - 1);
}

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

// Apart from the rest, whose registers it would take.
__device__ __noinline__ static float expanded(const bf16* b, const float* x, int rank) {
  float sum = 0.f;
  for (int r = 0; r < rank; r++) sum += x[r] * widen(b[r]);
  return sum;
}

// A weight of 4 bits in groups of 64: codes [N, K / 8], scales and biases [N, K / 64].
struct Matrix {
  const unsigned* codes;
  const bf16* scales;
  const bf16* biases;
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
  static constexpr int HIGH = TILES == 1 ? 1 : 2;  // tiles of 16 outputs that share what is read of the rows
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
  static constexpr size_t ANGLES = LOW_RANK + room((size_t)4 * MOST_ROWS * 3 * MOST_RANK);
  static constexpr size_t SPLITS = ANGLES + room((size_t)4 * MOST_ROWS * DIM);

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
  // [rows, DIM / 2]
  __device__ Angle* angles() const { return in_workspace<Angle>(ANGLES); }
  // [rows, kv heads, splits, heads, PARTIAL]
  __device__ float* splits() const { return in_workspace<float>(SPLITS); }

  // Shared memory: 1 / root mean square of hidden [MOST_ROWS], where a row's attention begins among all
  // tasks [MOST_ROWS + 1], positions [MOST_ROWS], stages of weights, and the warps' sums
  // [WARPS][HIGH * TILES * 128] (twice, for one tile), or the teams' own.
  __device__ float* factors() const { return reinterpret_cast<float*>(dynamic_shared()); }
  __device__ int* first_task() const { return reinterpret_cast<int*>(factors() + MOST_ROWS); }
  __device__ int* positions() const { return first_task() + MOST_ROWS + 4; }
  __device__ unsigned char* stage(int index) const {
    return reinterpret_cast<unsigned char*>(positions() + MOST_ROWS) + index % STAGES * STAGE_BYTES;
  }
  __device__ float* partial() const { return reinterpret_cast<float*>(stage(0) + STAGES * STAGE_BYTES); }

  // The next stage of weights to be fetched, and how many have been; how many have been used.
  int feed_phase, feed_unit, feed_batch, feed_chunk, fed, used;
  unsigned barriers, shrinks;
  int phase;
  bool alive;
  int lane, warp, g, t;

  __device__ const word* planned(int row) const { return plan + HEADER + (size_t)row * row_words; }
  __device__ static float eps() { return __uint_as_float((unsigned)EPS_BITS); }
  __device__ static int splits_of(int position) {
    const int pages = position / PAGE + 1;
    const int each = (pages + MOST_SPLITS - 1) / MOST_SPLITS;
    return (pages + each - 1) / each;
  }

  __device__ Matrix matrix(const word* at) const {
    return {reinterpret_cast<const unsigned*>(at[0]), reinterpret_cast<const bf16*>(at[1]),
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
    feed_phase = feed_batch = feed_chunk = fed = used = 0;
    feed_unit = blockIdx.x;
    for (int i = 0; i < STAGES - 1; i++) feed();
    place_tasks();
    embed();
    // The plan itself lies in memory that the processor wrote last.
    word* copied = in_workspace<word>(plan[3]);
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < HEADER + count * row_words; i += gridDim.x * THREADS)
      copied[i] = plan[i];
    plan = copied;
    for (int layer = 0; layer < LAYERS; layer++) {
      const word* own = table + layer * LAYER_WORDS;
      barrier();
      if (blockIdx.x == gridDim.x - 1) fetch_norms(own, layer + 1 == LAYERS);
      shrink<HIDDEN>(layer, LORA_QKV, 3, normed());
      project<HIDDEN, QKV_WIDTH, SINGLE, true>(
          normed(), [&](int row, int n0, int n1, float y0, float y1) {
            const int part0 = part_of(n0), part1 = part_of(n1);
            qkv()[(size_t)row * QKV_WIDTH + n0] =
                factors()[row] * (y0 + expand(row, layer, LORA_QKV, part0, n0 - start_of(part0)));
            qkv()[(size_t)row * QKV_WIDTH + n1] =
                factors()[row] * (y1 + expand(row, layer, LORA_QKV, part1, n1 - start_of(part1)));
          });
      barrier();
      attend_apart(plan, workspace, count, row_words, own, layer);
      barrier();
      shrink<Q_WIDTH>(layer, LORA_O, 1, mixed());
      const bf16* post_norm = reinterpret_cast<const bf16*>(own[POST_NORM]);
      project<Q_WIDTH, HIDDEN, WHOLE, false>(
          mixed(), [&](int row, int n0, int n1, float y0, float y1) {
            y0 += expand(row, layer, LORA_O, 0, n0);
            y1 += expand(row, layer, LORA_O, 0, n1);
            add_hidden(row, n0, n1, y0, y1, post_norm);
          });
      barrier();
      shrink<HIDDEN>(layer, LORA_GATE_UP, 2, normed());
      project<HIDDEN, 2 * INNER, GATED, true>(
          normed(), [&](int row, int n, int, float gate, float up) {
            gate = factors()[row] * (gate + expand(row, layer, LORA_GATE_UP, 0, n));
            up = factors()[row] * (up + expand(row, layer, LORA_GATE_UP, 1, n));
            active()[placed(row, n, INNER)] = narrow(gate / (1.f + __expf(-gate)) * up);
          });
      barrier();
      shrink<INNER>(layer, LORA_DOWN, 1, active());
      const bool last = layer + 1 == LAYERS;
      const word* next = last ? table + LAYERS * LAYER_WORDS : own + LAYER_WORDS;
      const bf16* next_norm = reinterpret_cast<const bf16*>(next[last ? NORM : INPUT_NORM]);
      project<INNER, HIDDEN, WHOLE, false>(
          active(), [&](int row, int n0, int n1, float y0, float y1) {
            y0 += expand(row, layer, LORA_DOWN, 0, n0);
            y1 += expand(row, layer, LORA_DOWN, 0, n1);
            add_hidden(row, n0, n1, y0, y1, next_norm);
          });
    }
    barrier();
    most_rank = 0;
    project<HIDDEN, VOCAB, SINGLE, true>(
        normed(), [&](int row, int n0, int n1, float y0, float y1) {
          if (n0 < VOCAB) logits[(size_t)row * VOCAB + n0] = factors()[row] * y0;
          if (n1 < VOCAB) logits[(size_t)row * VOCAB + n1] = factors()[row] * y1;
        });
    leave();
  }

  // Brings the norms that a layer and the next will need into the card's cache.
  __device__ void fetch_norms(const word* own, bool last) const {
    constexpr int LINES = (HIDDEN * 2 + 127) / 128;
    for (int i = threadIdx.x; i < 2 * LINES + 4; i += THREADS) {
      const int norm = i < LINES ? POST_NORM : last ? LAYER_WORDS + NORM : LAYER_WORDS + INPUT_NORM;
      if (i < 2 * LINES) prefetch(reinterpret_cast<const char*>(own[norm]) + i % LINES * 128);
      else prefetch(reinterpret_cast<const char*>(own[i % 2 ? Q_NORM : K_NORM]) + (i - 2 * LINES) / 2 * 128);
    }
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
    if (threadIdx.x < MOST_ROWS && (int)threadIdx.x < count) {
      const int at = (int)(planned(threadIdx.x)[0] >> 32);
      positions()[threadIdx.x] = at;
      first_task()[threadIdx.x + 1] = splits_of(at) * KV_HEADS;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      first_task()[0] = 0;
      for (int row = 0; row < count; row++) first_task()[row + 1] += first_task()[row];
    }
    __syncthreads();
  }

  // 1 / root mean square of every row, a warp for each; they are read in two steps, since they take a while.
  struct Squares {
    float numbers[(HIDDEN / 16 + 31) / 32];
  };

  __device__ void read_squares(Squares& own, int row) const {
#pragma unroll
    for (int i = 0; i < (HIDDEN / 16 + 31) / 32; i++) {
      const int at = i * 32 + lane;
      own.numbers[i] = row < count && at < HIDDEN / 16 ? squares()[(size_t)row * (HIDDEN / 16) + at] : 0.f;
    }
  }

  __device__ void norm_factors(Squares& own) {
    for (int row = warp; row < count; row += WARPS) {
      if (row != warp) read_squares(own, row);
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < (HIDDEN / 16 + 31) / 32; i++) sum += own.numbers[i];
      sum = warp_sum(sum);
      if (lane == 0) factors()[row] = rsqrtf(sum / HIDDEN + eps());
    }
  }

  __device__ void embed() {
    const word* own = table + LAYERS * LAYER_WORDS;
    const Matrix weight = matrix(own + EMBEDDING);
    const bf16* norm = reinterpret_cast<const bf16*>(table[INPUT_NORM]);
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < count * (DIM / 2); i += gridDim.x * THREADS)
      angles()[i] = angle(positions()[i / (DIM / 2)], i % (DIM / 2), DIM, __uint_as_float((unsigned)THETA_BITS));
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
    const unsigned* codes = weight.codes + (size_t)id * (HIDDEN / 8);
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

  // How a weight [N, K] is divided: units of 16 * HIGH outputs, whose groups of inputs come in stages.
  template <int K, int N, Kind KIND> struct Division {
    static constexpr int TALL = 16 * HIGH, UNITS = (N + TALL - 1) / TALL, GROUPS = K / GROUP;
    static constexpr int AT_ONCE = largest_divisor(GROUPS, 64 / HIGH), CHUNKS = GROUPS / AT_ONCE;
    // Bytes of a row in a stage: eight of them must fall into different banks.
    static constexpr int CODES = AT_ONCE * 32 + (AT_ONCE % 2 ? 0 : 32), SMALL = (AT_ONCE * 2 + 15) / 16 * 16 + 16;
    static_assert(TALL * (CODES + 2 * SMALL) <= STAGE_BYTES, "a stage");

    // Output number `row` of a unit: of gate and up eight each in turn, else one after another.
    __device__ static int output(int unit, int row) {
      const int tile = unit * HIGH + row / 16;
      if (KIND == GATED) return tile * 8 + row % 8 + (row % 16 < 8 ? 0 : N / 2);
      return tile * 16 + row % 16;
    }
  };

  // Starts to fetch the next stage of weights, in whatever phase it is needed: they do not wait for others.
  __device__ void feed() {
    const int batches = (count + ROWS - 1) / ROWS;
    while (feed_phase < 4 * LAYERS + 1) {
      const word* own = table + feed_phase / 4 * LAYER_WORDS;
      bool any;
      switch (feed_phase == 4 * LAYERS ? 4 : feed_phase % 4) {
        case 0: any = feed_stage<HIDDEN, QKV_WIDTH, SINGLE>(matrix(own + QKV), batches); break;
        case 1: any = feed_stage<Q_WIDTH, HIDDEN, WHOLE>(matrix(own + O), batches); break;
        case 2: any = feed_stage<HIDDEN, 2 * INNER, GATED>(matrix(own + GATE_UP), batches); break;
        case 3: any = feed_stage<INNER, HIDDEN, WHOLE>(matrix(own + DOWN), batches); break;
        default: any = feed_stage<HIDDEN, VOCAB, SINGLE>(matrix(own + HEAD), batches);
      }
      if (any) break;
      feed_phase++;
      feed_unit = blockIdx.x;
    }
    fed++;
    commit_copies();
  }

  template <int K, int N, Kind KIND>
  __device__ bool feed_stage(const Matrix w, int batches) {
    using D = Division<K, N, KIND>;
    if (feed_unit >= D::UNITS) return false;
    const int group = feed_chunk * D::AT_ONCE;
    // As many scales at once as they are aligned.
    constexpr int WIDE = D::AT_ONCE % 8 == 0 && D::GROUPS % 8 == 0 ? 8 : D::AT_ONCE % 2 == 0 ? 2 : 1;
#pragma unroll
    for (int tall = 0; tall < HIGH; tall++) {
      // Every warp a row.
      const int row = tall * 16 + warp;
      const size_t n = min(D::output(feed_unit, row), N - 1);
      unsigned char* codes = stage(fed) + row * D::CODES;
      const unsigned* from = w.codes + n * (K / 8) + group * 8;
      for (int at = lane; at < D::AT_ONCE * 2; at += 32) copy_async<16>(codes + at * 16, from + at * 4);
      unsigned char* scales = stage(fed) + D::TALL * D::CODES + row * D::SMALL;
      for (int at = lane; at < 2 * D::AT_ONCE / WIDE; at += 32) {
        const bf16* small = (at % 2 ? w.biases : w.scales) + n * D::GROUPS + group + at / 2 * WIDE;
        unsigned char* to = scales + (at % 2 ? D::TALL * D::SMALL : 0) + at / 2 * WIDE * 2;
        if (WIDE == 1) *reinterpret_cast<bf16*>(to) = *small;
        else copy_async<(WIDE == 1 ? 2 : WIDE) * 2>(to, small);
      }
    }
    if (++feed_chunk == D::CHUNKS) feed_chunk = 0, feed_batch++;
    if (feed_batch == batches) feed_batch = 0, feed_unit += gridDim.x;
    return true;
  }

  // y = x w^T; `finish` gets a row, two outputs of it and their numbers.
  template <int K, int N, Kind KIND, bool NORMED_INPUT, class Finish>
  __device__ void project(const bf16* x, Finish finish) {
    using D = Division<K, N, KIND>;
    constexpr bool TWICE = TILES == 1;
    constexpr int SUMS = HIGH * TILES * 128;
    const int batches = (count + ROWS - 1) / ROWS;
    int parity = 0, done_unit = -1, done_batch = 0;
    bool adapted = most_rank == 0, normed = !NORMED_INPUT;
    Squares squares;
    if (NORMED_INPUT) read_squares(squares, warp);
    auto finish_unit = [&] {
      if (done_unit < 0) return;
      // With one tile there is work for two warps: others each time.
      const int task = (warp + (TWICE ? 2 * (used % (WARPS / 2)) : 0)) % WARPS;
      if (task < 2 * TILES * HIGH) {
        const int tall = task / (2 * TILES), tile = task / 2 % TILES, b = task % 2;
        const float* sum = partial() + parity * WARPS * SUMS + (tall * TILES + tile) * 128 + b * 32 + lane;
        float y0 = 0.f, y1 = 0.f;
#pragma unroll
        for (int part = 0; part < WARPS; part++) {
          y0 += sum[part * SUMS];
          y1 += sum[part * SUMS + 64];
        }
        const int row = done_batch * ROWS + tile * 8 + 2 * t + b;
        const int n0 = D::output(done_unit, tall * 16 + g), n1 = KIND == GATED ? n0 : n0 + 8;
        // Which rows there are, `finish` asks itself where its warp must stay together.
        if (row < count || KIND == WHOLE) finish(row, n0, n1, y0, y1);
      }
      if (TWICE) parity ^= 1;
      done_unit = -1;
    };
    for (int unit = blockIdx.x; unit < D::UNITS; unit += gridDim.x) {
      for (int batch = 0; batch < batches; batch++) {
        const int rows_here = min(count - batch * ROWS, ROWS);
        const uint4* own = reinterpret_cast<const uint4*>(x) + (size_t)batch * TILES * D::GROUPS * 64;
        float sums[HIGH][TILES][4] = {};
        for (int chunk = 0; chunk < D::CHUNKS; chunk++) {
          Inputs<D> inputs;
          if (EARLY) read_inputs<D>(inputs, own, chunk * D::AT_ONCE, rows_here);
          wait_copies<STAGES - 2>();
          if (!adapted && done_unit >= 0) wait_for_shrunk(adapted);
          __syncthreads();
          feed();
          finish_unit();
          multiply_stage<D>(sums, inputs, own, chunk * D::AT_ONCE, rows_here);
          used++;
          if (!normed) normed = true, norm_factors(squares);
        }
        if (!TWICE) __syncthreads();
        float* mine = partial() + parity * WARPS * SUMS + warp * SUMS;
#pragma unroll
        for (int tall = 0; tall < HIGH; tall++)
#pragma unroll
          for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int i = 0; i < 4; i++) mine[(tall * TILES + tile) * 128 + i * 32 + lane] = sums[tall][tile][i];
        done_unit = unit, done_batch = batch;
      }
    }
    if (!adapted) wait_for_shrunk(adapted);
    __syncthreads();
    finish_unit();
  }

  __device__ void wait_for_shrunk(bool& done) {
    if (threadIdx.x == 0 && alive) wait_for(shrunk(), shrinks);
    done = true;
  }

  // What a warp multiplies of the rows: of its groups of a stage, in turn one for each warp. With one tile, all
  // is asked for before the weights are waited for.
  static constexpr bool EARLY = TILES == 1;
  template <class D> struct Inputs {
    static constexpr int STEPS = (D::AT_ONCE + WARPS - 1) / WARPS;
    uint4 numbers[EARLY ? STEPS : 1][TILES][2];
  };

  template <class D>
  __device__ void read_inputs(Inputs<D>& inputs, const uint4* x, int first, int rows_here) const {
#pragma unroll
    for (int step = 0; step < (EARLY ? Inputs<D>::STEPS : 1); step++)
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        const int group = step * WARPS + warp;
        const uint4* own = x + ((size_t)tile * D::GROUPS + first + group) * 64 + lane;
        uint4* to = inputs.numbers[step][tile];
        to[0] = to[1] = make_uint4(0, 0, 0, 0);
        if (tile * 8 + g < rows_here && (D::AT_ONCE % WARPS == 0 || group < D::AT_ONCE)) to[0] = own[0], to[1] = own[32];
      }
  }

  template <class D>
  __device__ void multiply_stage(
      float (&sums)[HIGH][TILES][4], Inputs<D>& inputs, const uint4* x, int first, int rows_here) const {
    const unsigned char* codes = stage(used);
    const unsigned char* scales = codes + D::TALL * D::CODES;
    const unsigned char* biases = scales + D::TALL * D::SMALL;
#pragma unroll(EARLY ? 4 : 1)
    for (int step = 0; step < Inputs<D>::STEPS; step++) {
      const int group = step * WARPS + warp;
      if (D::AT_ONCE % WARPS && group >= D::AT_ONCE) break;
      if (!EARLY) read_inputs<D>(inputs, x, first + step * WARPS, rows_here);
      const uint4(&v)[TILES][2] = inputs.numbers[EARLY ? step : 0];
      float total[TILES][4] = {};
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          multiply(total[tile], ONES, ONES, ONES, ONES, v[tile][half].x, v[tile][half].y);
          multiply(total[tile], ONES, ONES, ONES, ONES, v[tile][half].z, v[tile][half].w);
        }
#pragma unroll
      for (int tall = 0; tall < HIGH; tall++) {
        uint2 c[2];
        float scale[2], bias[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const int row = tall * 16 + r * 8 + g;
          c[r] = reinterpret_cast<const uint2*>(codes + row * D::CODES)[group * 4 + t];
          scale[r] = widen(reinterpret_cast<const bf16*>(scales + row * D::SMALL)[group]);
          bias[r] = widen(reinterpret_cast<const bf16*>(biases + row * D::SMALL)[group]) - 128.f * scale[r];
        }
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
          float dots[4] = {};
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const unsigned a = half ? c[0].y : c[0].x, b = half ? c[1].y : c[1].x;
            const uint4 own = v[tile][half];
            multiply(dots, widened(a, 0), widened(b, 0), widened(a, 4), widened(b, 4), own.x, own.y);
            multiply(dots, widened(a, 8), widened(b, 8), widened(a, 12), widened(b, 12), own.z, own.w);
          }
#pragma unroll
          for (int i = 0; i < 4; i++)
            sums[tall][tile][i] += scale[i / 2] * dots[i] + bias[i / 2] * total[tile][i % 2];
        }
      }
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
    return expanded(own.b + (size_t)n * own.rank, low_rank() + ((size_t)row * 3 + part) * MOST_RANK, own.rank);
  }

  // A team's memory.
  struct alignas(16) Team {
    float q[SHARED][DIM];
    bf16 fresh[2][DIM];  // key and value of the row itself
    float scores[HEADS_AT_ONCE][PAGE];
    float largest[HEADS_AT_ONCE], sum[HEADS_AT_ONCE], fade[HEADS_AT_ONCE];
    float values[TEAM / 32][HEADS_AT_ONCE][DIM];
    unsigned last[4];
  };

  __device__ bf16* page(int row, int index, int layer, int kind, int head) const {
    bf16* start = reinterpret_cast<bf16*>(planned(row)[2 + index]);
    return start + (size_t)((layer * 2 + kind) * KV_HEADS + head) * PAGE * DIM;
  }

  // A function of its own: the compiler would else keep its registers and those of products together, and
  // many of them in memory.
  __device__ __noinline__ static void attend_apart(
      const word* plan, unsigned char* workspace, int count, int row_words, const word* own, int layer) {
    Step step;
    step.plan = plan, step.workspace = workspace, step.count = count, step.row_words = row_words;
    step.lane = threadIdx.x % 32;
    step.attend(own, layer);
  }

  // Tasks: a row, a head of keys and values, and some of its pages. Whoever is the last of a row's head
  // joins what all found.
  __device__ void attend(const word* own, int layer) {
    const int team = threadIdx.x / TEAM;
    Team& memory = reinterpret_cast<Team*>(partial())[team];
    const int tasks = first_task()[count];
    int row = 0;
    for (int task = blockIdx.x + gridDim.x * team; task < tasks; task += gridDim.x * TEAMS) {
      while (task >= first_task()[row + 1]) row++;
      const int head = (task - first_task()[row]) % KV_HEADS, split = (task - first_task()[row]) / KV_HEADS;
      for (int shared = 0; shared < SHARED; shared += HEADS_AT_ONCE)
        attend_heads(memory, own, row, head, shared, split, layer);
      const int all = splits_of(positions()[row]);
      if (all > 1) join(memory, row, head, all);
    }
  }

  // Queries of a row's head of keys, and the key and value of the row itself: to memory, those also to their
  // page if this is the last split.
  __device__ void ready_heads(Team& memory, const word* own, int row, int head, int layer, bool last) const {
    const int team_warp = threadIdx.x % TEAM / 32, at = positions()[row];
    Angle turned[DIM / 64];
#pragma unroll
    for (int i = 0; i < DIM / 64; i++) turned[i] = angles()[row * (DIM / 2) + lane + 32 * i];
    const float* from = qkv() + (size_t)row * QKV_WIDTH;
    float x[DIM / 32];
    for (int i = team_warp; i < SHARED; i += TEAM / 32) {
#pragma unroll
      for (int j = 0; j < DIM / 32; j++) x[j] = from[(head * SHARED + i) * DIM + lane + 32 * j];
      norm_and_rotate<DIM>(x, reinterpret_cast<const bf16*>(own[Q_NORM]), turned, lane, eps());
#pragma unroll
      for (int j = 0; j < DIM / 32; j++) memory.q[i][lane + 32 * j] = x[j] * rsqrtf((float)DIM) * 1.44269504f;
    }
    if (last && team_warp >= 2) {
      const int kind = team_warp - 2;
#pragma unroll
      for (int j = 0; j < DIM / 32; j++) x[j] = from[Q_WIDTH + kind * KV_WIDTH + head * DIM + lane + 32 * j];
      if (kind == 0) norm_and_rotate<DIM>(x, reinterpret_cast<const bf16*>(own[K_NORM]), turned, lane, eps());
      bf16* to = page(row, at / PAGE, layer, kind, head) + at % PAGE * DIM;
#pragma unroll
      for (int j = 0; j < DIM / 32; j++) to[lane + 32 * j] = memory.fresh[kind][lane + 32 * j] = narrow(x[j]);
    }
  }

  __device__ float* split_at(int row, int head, int split, int shared) const {
    return splits() +
           ((((size_t)row * KV_HEADS + head) * MOST_SPLITS + split) * SHARED + shared) * PARTIAL;
  }

  // Some of the query heads that share keys, over the pages of a split.
  __device__ void attend_heads(
      Team& memory, const word* own, int row, int head, int shared, int split, int layer) const {
    constexpr int SLICE = DIM / 8, SUBSETS = TEAM / SLICE, OWN = PAGE / SUBSETS;
    const int team = threadIdx.x / TEAM, thread = threadIdx.x % TEAM, team_warp = thread / 32;
    const int at = positions()[row], all = splits_of(at), pages = at / PAGE + 1;
    const int each = (pages + MOST_SPLITS - 1) / MOST_SPLITS;
    const int first = split * each, end = min(first + each, pages);
    const int heads = min(SHARED - shared, HEADS_AT_ONCE);
    // Keys: eight lanes share one, each has DIM / 8 of its numbers.
    const int eighth = lane % 8, key = team_warp * (PAGE / 4) + lane / 8;
    // Values: DIM / 8 threads share one, each has 8 of its numbers.
    const int subset = thread / SLICE, column = thread % SLICE * 8;
    float sums[HEADS_AT_ONCE][8] = {};
    for (int p = first; p < end; p++) {
      const int seen = min(at + 1 - p * PAGE, PAGE), fresh = at - p * PAGE;
      const bf16* k = page(row, p, layer, 0, head) + eighth * SLICE;
      const bf16* v = page(row, p, layer, 1, head) + column;
      uint4 keys[PAGE / 16][SLICE / 8];
#pragma unroll
      for (int i = 0; i < PAGE / 16; i++)
#pragma unroll
        for (int j = 0; j < SLICE / 8; j++) {
          keys[i][j] = make_uint4(0, 0, 0, 0);
          if (key + i * 4 < seen && key + i * 4 != fresh)
            keys[i][j] = reinterpret_cast<const uint4*>(k + (key + i * 4) * DIM)[j];
        }
      if (p == first) {
        if (shared == 0) ready_heads(memory, own, row, head, layer, end == pages);
        if (thread < HEADS_AT_ONCE) memory.largest[thread] = LEAST, memory.sum[thread] = 0.f;
        team_sync(team, TEAM);
      }
#pragma unroll
      for (int i = 0; i < PAGE / 16; i++)
#pragma unroll
        for (int j = 0; j < SLICE / 8; j++)
          if (key + i * 4 == fresh)
            keys[i][j] = reinterpret_cast<const uint4*>(memory.fresh[0] + eighth * SLICE)[j];
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
      uint4 values[OWN];
#pragma unroll
      for (int i = 0; i < OWN; i++) {
        const int value = i * SUBSETS + subset;
        values[i] = make_uint4(0, 0, 0, 0);
        if (value < seen && value != fresh) values[i] = *reinterpret_cast<const uint4*>(v + value * DIM);
      }
#pragma unroll
      for (int i = 0; i < OWN; i++)
        if (i * SUBSETS + subset == fresh)
          values[i] = *reinterpret_cast<const uint4*>(memory.fresh[1] + column);
      team_sync(team, TEAM);
      if (team_warp < heads) {
        float* scores = memory.scores[team_warp];
        const float one = scores[lane], other = scores[lane + 32], before = memory.largest[team_warp];
        const float largest = fmaxf(before, warp_max(fmaxf(one, other)));
        const float p0 = exp2f(one - largest), p1 = exp2f(other - largest);
        scores[lane] = p0, scores[lane + 32] = p1;
        const float sum = warp_sum(p0 + p1);
        __syncwarp();
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
      if (p + 1 < end) team_sync(team, TEAM);
    }
#pragma unroll
    for (int h = 0; h < HEADS_AT_ONCE; h++)
#pragma unroll
      for (int c = 0; c < 8; c++) {
        float sum = sums[h][c];
        for (int other = SLICE; other < 32; other *= 2) sum += __shfl_xor_sync(0xffffffff, sum, other);
        if (lane < SLICE) memory.values[team_warp][h][column + c] = sum;
      }
    team_sync(team, TEAM);
    for (int i = thread; i < heads * DIM; i += TEAM) {
      const int h = i / DIM, d = i % DIM;
      float sum = 0.f;
#pragma unroll
      for (int part = 0; part < TEAM / 32; part++) sum += memory.values[part][h][d];
      if (all == 1) {
        mixed()[placed(row, (head * SHARED + shared + h) * DIM + d, Q_WIDTH)] = narrow(sum / memory.sum[h]);
      } else {
        float* to = split_at(row, head, split, shared + h);
        to[d] = sum;
        if (d == 0) to[DIM] = memory.largest[h], to[DIM + 1] = memory.sum[h];
      }
    }
    team_sync(team, TEAM);
  }

  __device__ void join(Team& memory, int row, int head, int all) const {
    const int team = threadIdx.x / TEAM, thread = threadIdx.x % TEAM;
    __threadfence();
    team_sync(team, TEAM);
    unsigned* done = attended() + row * KV_HEADS + head;
    if (thread == 0) memory.last[0] = fetch_add(done, 1) + 1 == (unsigned)all;
    team_sync(team, TEAM);
    if (!memory.last[0]) return;
    if (thread == 0) *done = 0;
    __threadfence();
    // How much each split counts, in the place of the queries.
    for (int h = thread / 32; h < SHARED; h += TEAM / 32) {
      const float* own = split_at(row, head, min(lane, all - 1), h) + DIM;
      const float largest = lane < all ? own[0] : LEAST;
      const float share = exp2f(largest - warp_max(largest));
      const float total = warp_sum(lane < all ? share * own[1] : 0.f);
      memory.q[h][lane] = share / total;
    }
    team_sync(team, TEAM);
    for (int i = thread; i < SHARED * DIM; i += TEAM) {
      const int h = i / DIM, d = i % DIM;
      float sum = 0.f;
#pragma unroll 8
      for (int split = 0; split < all; split++) sum += memory.q[h][split] * split_at(row, head, split, h)[d];
      mixed()[placed(row, (head * SHARED + h) * DIM + d, Q_WIDTH)] = narrow(sum);
    }
    team_sync(team, TEAM);
  }
};
