// A block has a state, its memory, and barriers that all blocks meet at.
//
// What all threads of a block know lies in shared memory, and phases are functions of their own. The compiler would
// else keep registers for all phases at once, and spill most of them.
//
// A barrier of all blocks has two halves: `arrive_grid` says that this block's outputs are there, `wait_grid` waits
// for those of the others. Between the two a block prefetches what the next phase needs and no phase writes: weights,
// norms, LoRA, older keys. Blocks wait for each other, so all of them must be on the card at once (launches.rs).
//
// A counter that does not come far enough for some seconds (it always should) fails the step: all blocks give up, and
// logits are NaN. A step that goes on after a plan that never came does the same at once.

constexpr unsigned PATIENCE = 1u << 23;

struct State {
  const word* table;
  const word* plan;
  const unsigned* sampled;
  float* logits;
  unsigned char* workspace;
  int count, row_words, most_rank;  // of the plan
  int steps;                        // since the last whole plan
  bool refused;                     // it goes on after a plan that never came
  unsigned barriers, phase;         // thread 0's
};

template <class T> __device__ inline T* in_shared(size_t at) { return reinterpret_cast<T*>(dynamic_shared() + at); }
__device__ inline State& state() { return *in_shared<State>(STATE); }
__device__ inline Signals& signals() { return *in_shared<Signals>(SIGNALS); }
__device__ inline float* factors() { return in_shared<float>(FACTORS); }
__device__ inline int* first_tasks(bool windowed) { return in_shared<int>(FIRST_TASKS) + windowed * TASKS_OF_KIND; }
__device__ inline int* positions() { return in_shared<int>(POSITIONS); }
__device__ inline unsigned char* stage(int slot) { return in_shared<unsigned char>(FIRST_STAGE) + slot * STAGE_BYTES; }
__device__ inline uint4* inputs(int slot) { return in_shared<uint4>(FIRST_INPUTS + slot * INPUT_BYTES); }
__device__ inline float2* sums_of(int buffer, int warp) {
  return in_shared<float2>(ALL_SUMS) + (buffer * WARPS + warp) * OWN_SUMS;
}
__device__ inline Team& team_memory(int team) { return in_shared<Team>(FIRST_INPUTS)[team]; }

__device__ inline int lane() { return threadIdx.x % 32; }
__device__ inline int warp() { return threadIdx.x / 32; }
// Where a lane is in a tensor core's tile.
__device__ inline int tile_row() { return lane() / 4; }
__device__ inline int tile_column() { return lane() % 4; }

// c [8, 8] += a [8, 16] b [16, 8]: the upper half of a tile.
__device__ inline void multiply_upper(float (&c)[2], unsigned a0, unsigned a2, unsigned b0, unsigned b1) {
  float both[4] = {c[0], c[1], 0.f, 0.f};
  multiply(both, a0, 0, a2, 0, b0, b1);
  c[0] = both[0], c[1] = both[1];
}

__device__ inline int rows() { return state().count; }
__device__ inline int batches() { return (rows() + ROWS - 1) / ROWS; }
__device__ inline const word* planned(int row) { return state().plan + HEADER + (size_t)row * state().row_words; }
__device__ inline float eps() { return __uint_as_float((unsigned)EPS_BITS); }
__device__ inline float residual_factor() { return __uint_as_float((unsigned)RESIDUAL_FACTOR_BITS); }
__device__ inline float logits_factor() { return __uint_as_float((unsigned)LOGITS_FACTOR_BITS); }

template <class T> __device__ inline T* in_workspace(size_t at) { return reinterpret_cast<T*>(state().workspace + at); }
// Arrivals at barriers, where the copy of the plan is, and whether something went wrong.
__device__ inline unsigned* arrived() { return in_workspace<unsigned>(0); }
__device__ inline word* plan_at() { return in_workspace<word>(128); }
__device__ inline unsigned* failed() { return in_workspace<unsigned>(192); }
// When it began and ended in nanoseconds, and in cycles when it began and every phase ended.
__device__ inline word* stamps() { return in_workspace<word>(STAMPS); }
// [rows, kv heads]: splits that are done
__device__ inline unsigned* attended() { return in_workspace<unsigned>(ATTENDED); }
// [rows, HIDDEN], [rows, HIDDEN / 16], [rows, QKV_WIDTH]
__device__ inline float* hidden() { return in_workspace<float>(HIDDEN_AT); }
__device__ inline float* squares() { return in_workspace<float>(SQUARES); }
__device__ inline float* qkv() { return in_workspace<float>(QKV_AT); }
// inputs of products, as `swizzled`
__device__ inline bf16* normed() { return in_workspace<bf16>(NORMED); }
__device__ inline bf16* mixed() { return in_workspace<bf16>(MIXED); }
__device__ inline bf16* active() { return in_workspace<bf16>(ACTIVE); }
// [rows, DIM / 2], of each rotation
__device__ inline Angle* angles(int rotation) {
  return in_workspace<Angle>(ANGLES) + (ROTATIONS > 1 ? rotation * rows() * (DIM / 2) : 0);
}
// What attention or MLP will add, before it is normed: [rows, HIDDEN], [rows, HIDDEN / 16]
__device__ inline float* branch() { return in_workspace<float>(BRANCH); }
__device__ inline float* branch_squares() { return in_workspace<float>(BRANCH_SQUARES); }
// [rows, kv heads, splits, heads, PARTIAL]
__device__ inline float* split_at(int row, int head, int split, int query) {
  const size_t index = (((size_t)row * KV_HEADS + head) * MOST_SPLITS + split) * GQA_GROUP + query;
  return in_workspace<float>(SPLITS) + index * PARTIAL;
}

// The table's words for a layer, or behind the last: they are kept from the layer before, since what they point to is
// needed at once. [2][LAYER_WORDS]
__device__ inline word* layer_words(int layer) { return in_shared<word>(WORDS) + layer % 2 * LAYER_WORDS; }
__device__ inline void keep_words(int layer) {
  const bool last = layer == LAYERS;
  if (lane() < (last ? HEAD_WORDS : LAYER_WORDS))
    layer_words(layer)[lane()] = state().table[layer * LAYER_WORDS + lane()];
}
template <class T> __device__ inline const T* weight(int layer, int place) {
  return reinterpret_cast<const T*>(layer_words(layer)[place]);
}

// What this layer has of what layers differ in.
__device__ inline bool unrotated(int layer) { return SOME_UNROTATED && layer_words(layer)[FLAGS] & UNROTATED; }
__device__ inline bool windowed(int layer) { return WINDOW && layer_words(layer)[FLAGS] & WINDOWED; }

__device__ inline int rotation(int layer) {
  return ROTATIONS > 1 && layer_words(layer)[FLAGS] & SECOND_ROTATION ? 1 : 0;
}

// All warps that compute.
__device__ inline void sync() { team_sync(TEAMS, COMPUTING * 32); }
// Those that multiply.
__device__ inline void sync_multiplying() { team_sync(TEAMS + 1, THREADS); }

__device__ inline void stamp() {
  if (threadIdx.x == 0 && blockIdx.x == 0) stamps()[state().phase++] = clock64();
}

// The plan, which is the last step's if this one goes on.
__device__ inline void read_plan(word first) {
  State& own = state();
  if ((unsigned)first & GOES_ON) {
    own.plan = in_workspace<word>(*plan_at());
    own.steps = (int)(first >> 32 & 0xffff);
  }
  own.count = (int)(first & 0xffff);
  if (own.plan[0] >> 48 != first >> 48) own.refused = true;
  own.row_words = (int)own.plan[1], own.most_rank = (int)own.plan[2];
}

__device__ inline void begin(const word* table, const word* plan, const unsigned* sampled, float* logits,
                             unsigned char* workspace) {
  if (threadIdx.x == 0) {
    state() = {table, plan, sampled, logits, workspace};
    read_plan(plan[0]);
    state().phase = 2;
    Signals& own = signals();
    for (int i = 0; i < STAGES; i++) begin_barrier(&own.full[i], 1), begin_barrier(&own.empty[i], WARPS);
    for (int i = 0; i < INPUT_STAGES; i++)
      begin_barrier(&own.inputs_full[i], 1), begin_barrier(&own.inputs_empty[i], WARPS);
    for (int i = 0; i < SUMS; i++) begin_barrier(&own.summed[i], WARPS), begin_barrier(&own.taken[i], 2);
    begin_barrier(&own.inputs_ready, 1);
    fence_copies();
    if (blockIdx.x == 0) stamps()[0] = nanoseconds();
    stamp();
  }
  __syncthreads();
}

// Waits until a counter has come so far. Where it does not (it always should), all blocks give up.
__device__ inline void wait_for(const unsigned* counter, unsigned target) {
  unsigned patience = PATIENCE;
  while (load_acquire(counter) < target) {
    if (--patience == 0 || (patience % 1024 == 0 && load_acquire(failed()))) {
      atomicAdd(failed(), 1u);
      return;
    }
  }
}

// All blocks wait for each other: this one has done its phase ...
__device__ __noinline__ static void arrive_grid() {
  if (TILES > 1) fence_copies();
  sync();
  if (threadIdx.x == 0) {
    state().barriers += gridDim.x;
    add_release(arrived(), 1);
  }
}

// ... and all have.
__device__ inline void wait_grid_here() {
  if (threadIdx.x == 0) {
    wait_for(arrived(), state().barriers);
    stamp();
  }
  sync();
}
__device__ __noinline__ static void wait_grid() { wait_grid_here(); }

// The same, before a product: its inputs may be loaded. A call would wait for all loads that are under way.
__device__ inline void wait_inputs_here() {
  wait_grid_here();
  if (TILES > 1 && threadIdx.x == 0) {
    fence_copies();
    arrive(&signals().inputs_ready);
  }
}
__device__ __noinline__ static void wait_inputs() { wait_inputs_here(); }

// By one thread: a step that went wrong has NaN in every row.
__device__ inline void spoil_logits() {
  for (int row = 0; row < rows(); row++) state().logits[(size_t)row * VOCAB] = __uint_as_float(0x7fc00000);
}

// The last block to leave resets the counter for the next launch.
__device__ inline void leave() {
  sync();
  if (threadIdx.x != 0) return;
  stamp();
  if (blockIdx.x == 0) stamps()[1] = nanoseconds();
  if (load_acquire(failed())) return spoil_logits();
  if (fetch_add(arrived(), 1) + 1 == state().barriers + gridDim.x) *arrived() = 0;
}
