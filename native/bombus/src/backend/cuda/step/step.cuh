// The fused step makes one token for each of some sequences: a whole model in one launch.
//
// A persistent kernel has as many blocks as the card has multiprocessors; they stay for all phases. A launch for each
// phase would cost more than the phase. `|` is a barrier of all blocks:
//
//   embed |  [ q, k, v | attention | o | gate, up | down ] x LAYERS  | head
//
//   phase      reads in the workspace                writes there
//   embed      -                                     hidden, squares, normed, angles
//   q, k, v    normed, squares                       qkv
//   attention  qkv, angles, and pages                mixed, and its own position in a page
//   o          mixed, hidden                         hidden, squares, normed
//   gate, up   normed, squares                       active = silu(gate) * up, or gelu
//   down       active, hidden                        hidden, squares, normed
//   head       normed, squares                       logits
//
// With norms behind attention and MLP (POST_NORMS), o and down write `branch`, and a phase behind each (`add_branch`) adds
// it, normed, to hidden.
//
// Each phase also adds its outputs' x a^T for the next product (lora.cuh). In a block, with one tile of rows:
//
//   producer warp      [weights of all products, one behind another: it waits for free stages, never at a |]
//   16 compute warps   [embed] | [ multiply ] | [ attend ] | [ multiply ] | ...
//   3 epilogue warps           | [ add up the warps' sums, epilogue ] | ...
//
// With more tiles the compute warps run the epilogue, and a second producer brings inputs behind each |. Why: at few
// rows a step takes as long as its weights take to arrive, so these must never stop arriving.

__device__ inline float embedded(const word* weight, int id, int n) {
  const unsigned* codes = reinterpret_cast<const unsigned*>(weight[0]) + (size_t)id * (HIDDEN / 8);
  const size_t group = (size_t)id * (HIDDEN / GROUP) + n / GROUP;
  const float code = codes[n / 8] >> n % 8 * 4 & 15;
  const float scale = widen(reinterpret_cast<const bf16*>(weight[1])[group]);
  const float x = widen(narrow(code * scale + widen(reinterpret_cast<const bf16*>(weight[2])[group])));
  if (EMBEDDING_FACTOR_BITS == 0x3f800000) return x;
  return widen(narrow(x * __uint_as_float((unsigned)EMBEDDING_FACTOR_BITS)));
}

__device__ inline Angle rotation_of(int at, int pair, int rotation) {
  if (!SCALED) return angle(at, pair, DIM, __uint_as_float((unsigned)THETA_BITS));
  const float* tables = reinterpret_cast<const float*>(state().table[LAYERS * LAYER_WORDS + ROTATION]);
  return angle_of(at, pair, DIM, tables + rotation * (DIM / 2 + 1));
}

template <Specialization SPECIAL> __device__ __noinline__ void embed() {
  const Product at(-1);
  const word* weight = state().table + LAYERS * LAYER_WORDS + EMBEDDING;
  const bf16* norm = reinterpret_cast<const bf16*>(state().table[INPUT_NORM]);
  for (int rotation = 0; rotation < ROTATIONS; rotation++)
#pragma unroll 1
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < rows() * (DIM / 2); i += gridDim.x * THREADS)
      angles(rotation)[i] = rotation_of(positions()[i / (DIM / 2)], i % (DIM / 2), rotation);
#pragma unroll 1
  for (int unit = blockIdx.x; unit < HIDDEN / 16; unit += gridDim.x)
#pragma unroll 1
    for (int tile = warp() / 2; tile * 8 < rows(); tile += WARPS / 2) {
      const int n = unit * 16 + tile_row();
      const Outputs out = {{n, n + 8}, tile * 8 + 2 * tile_column() + warp() % 2};
      Shrink<SPECIAL, 2, 3> shrink;
      shrink.prefetch(at, out.row, n);
      float x0 = 0.f, x1 = 0.f;
      if (out.row < rows()) {
        int id = state().steps ? -1 - out.row : (int)(unsigned)planned(out.row)[0];
        if (id < 0) id = (int)state().sampled[-1 - id];
        x0 = embedded(weight, id, n), x1 = embedded(weight, id, n + 8);
      }
      shrink.prepare(at, out.row);
      set_hidden(at, out, HiddenPlace::of(out), x0, x1, norm[n], norm[n + 8], shrink);
    }
}

// Where norms stand behind attention and MLP: adds what they made, normed, to what is hidden. A product and the one behind
// it are as in `ResidualEpilogue`; after, before: norms of the branch, and of the next phase.
template <Specialization SPECIAL>
__device__ __noinline__ void add_branch(int product, const bf16* after, const bf16* before) {
  const Product at(product);
  find_factors(branch_squares(), warp(), WARPS);
  sync_multiplying();
#pragma unroll 1
  for (int unit = blockIdx.x; unit < HIDDEN / 16; unit += gridDim.x)
#pragma unroll 1
    for (int tile = warp() / 2; tile * 8 < rows(); tile += WARPS / 2) {
      const int n = unit * 16 + tile_row();
      const Outputs out = {{n, n + 8}, tile * 8 + 2 * tile_column() + warp() % 2};
      Shrink<SPECIAL, 2, 3> shrink;
      shrink.prefetch(at, out.row, n);
      float x0 = 0.f, x1 = 0.f;
      if (out.there()) {
        const float factor = residual_factor() * factors()[out.row];
        const size_t first = (size_t)out.row * HIDDEN + n;
        x0 = hidden()[first] + factor * branch()[first] * widen(after[n]);
        x1 = hidden()[first + 8] + factor * branch()[first + 8] * widen(after[n + 8]);
      }
      shrink.prepare(at, out.row);
      set_hidden(at, out, HiddenPlace::of(out), x0, x1, before[n], before[n + 8], shrink);
    }
}

// o or down, which change what is hidden: at once, or in a phase of their own.
template <class D>
__device__ void project_residual(Progress& progress, const bf16* x, int product, const bf16* after, const bf16* before) {
  if constexpr (POST_NORMS) {
    project_adapted<D, BranchEpilogue>(progress, x, product);
    wait_grid();
    if (warp() < WARPS && adapted()) add_branch<ROWS_BY_LANES>(product, after, before);
    else if (warp() < WARPS) add_branch<NONE>(product, after, before);
    arrive_grid();
  } else project_adapted<D, ResidualEpilogue>(progress, x, product, before);
}

// Brings a layer's norms into the card's cache.
__device__ inline void prefetch_norms(int layer) {
  constexpr int LINES = (HIDDEN * 2 + 127) / 128;
#pragma unroll 1
  for (int i = threadIdx.x; i < 2 * LINES + 4; i += THREADS) {
    const int norm = i < LINES ? POST_NORM : INPUT_NORM;
    if (i < 2 * LINES) prefetch(weight<char>(layer, norm) + i % LINES * 128);
    else if (QK_NORM) prefetch(weight<char>(layer, i % 2 ? Q_NORM : K_NORM) + (i - 2 * LINES) / 2 * 128);
    if (POST_NORMS && i < 2 * LINES)
      prefetch(weight<char>(layer, i < LINES ? AFTER_ATTENTION : AFTER_MLP) + i % LINES * 128);
  }
}

// A whole plan lies in memory that the processor wrote last: this copy is used from the first layer's attention on, and by
// steps that go on.
__device__ inline word* copy_plan() {
  word* copied = in_workspace<word>(state().plan[3]);
  if (state().steps) return copied;
  if (blockIdx.x == 0 && threadIdx.x == 0) *plan_at() = state().plan[3];
  const int words = HEADER + rows() * state().row_words;
#pragma unroll 1
  for (int i = blockIdx.x * THREADS + threadIdx.x; i < words; i += gridDim.x * THREADS) copied[i] = state().plan[i];
  return copied;
}

// What is kept of a layer, by a warp.
__device__ inline void keep(int layer) {
  keep_words(layer);
  if (TILES == 1 && adapted() && layer < LAYERS) keep_loras(layer);
}

// The first inputs, by the warps that multiply.
__device__ inline void begin_rows() {
  if (TILES > 1 && adapted()) keep_matrices(Product(-1));
  sync();
  if (warp() >= WARPS) return;
  if (adapted()) embed<ROWS_BY_LANES>();
  else embed<NONE>();
}

__device__ __noinline__ void compute() {
  const bool multiplies = warp() < WARPS;
  Progress progress = {};
  word* copied = nullptr;
  if (warp() == COMPUTING - 1) keep(0);
  place_tasks();
  begin_rows();
  if (multiplies) copied = copy_plan();
  arrive_grid();
#pragma unroll 1
  for (int layer = 0; layer < LAYERS; layer++) {
    const int product = layer * PRODUCTS;
    project_adapted<Qkv, QkvEpilogue>(progress, normed(), product);
    if (threadIdx.x == 0) state().plan = copied;
    if (multiplies) attend(layer);
    else wait_grid();
    if (warp() == COMPUTING - 1) keep(layer + 1);
    arrive_grid();
    if (blockIdx.x == gridDim.x - 1 && multiplies && layer + 1 < LAYERS) prefetch_norms(layer + 1);
    project_residual<Output>(progress, mixed(), product + 1, weight<bf16>(layer, AFTER_ATTENTION),
                             weight<bf16>(layer, POST_NORM));
    project_adapted<GateUp, SwigluEpilogue>(progress, normed(), product + 2);
    const int next = layer + 1 == LAYERS ? (int)NORM : (int)INPUT_NORM;
    project_residual<Down>(progress, active(), product + 3, weight<bf16>(layer, AFTER_MLP),
                           weight<bf16>(layer + 1, next));
  }
  project<Head>(progress, normed(), LogitsEpilogue{PRODUCTS * LAYERS});
  leave();
}

__device__ inline void run() {
  // A step after one that never was.
  if (state().refused) {
    if (blockIdx.x == 0 && threadIdx.x == 0) spoil_logits();
    return;
  }
  if (warp() < COMPUTING) compute();
  else if (warp() == COMPUTING) produce_all_weights();
  else produce_all_inputs();
}
