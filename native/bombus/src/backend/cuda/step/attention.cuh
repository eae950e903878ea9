// Attention of single rows goes over pages of keys and values, on tensor cores (split K: Dao et al., "Flash-Decoding",
// 2023).
//
// A task is a row, a head of keys and values, and some of the pages that it sees (a split), for a team of four warps. The query
// heads of the head are the rows of a tile, so each key and value is read once for all of them. Of a page:
//   score_page   each warp makes the scores of 16 positions, [query heads, positions], into the team's memory
//   mix_page     each warp takes all 64 scores, and a fourth of the values' numbers; the softmax is made on the way
// The row's own key and value come from `qkv`, and go into their page on the way. Older keys are read before the
// barrier that q, k and v come with.
//
// Splits of a row's head meet in the workspace. Whoever is the last joins them: tasks are not bound to blocks, but the
// numbers do not depend on who joins.

constexpr int TEAM_WARPS = TEAM / 32, OWN_VALUES = DIM / TEAM_WARPS / 8;  // tiles of eight
// A page's keys and values of wider heads would not fit the registers together.
constexpr bool VALUES_LATE = DIM > 128;

// What a row sees of its sequence: all pages up to its own, or those that its window reaches into. They are divided into
// as many splits as there may be.
struct Sight {
  int at, from;  // the first position that is seen

  __device__ Sight(int at, bool windowed) : at(at), from(windowed && at + 1 > WINDOW ? at + 1 - WINDOW : 0) {}
  __device__ int first() const { return WINDOW ? from / PAGE : 0; }
  __device__ int end() const { return at / PAGE + 1; }
  __device__ int pages() const { return end() - first(); }
  __device__ int of_split() const { return (pages() + MOST_SPLITS - 1) / MOST_SPLITS; }
  __device__ int splits() const { return (pages() + of_split() - 1) / of_split(); }
};

// Where the attention of every row begins among all tasks, in both kinds of layers.
__device__ inline void place_tasks() {
  if (threadIdx.x < MOST_ROWS && (int)threadIdx.x < rows()) {
    const int at = (int)(planned(threadIdx.x)[0] >> 32) + state().steps;
    positions()[threadIdx.x] = at;
    for (int kind = 0; kind < ATTENTION_KINDS; kind++)
      first_tasks(kind)[threadIdx.x + 1] = Sight(at, kind).splits() * KV_HEADS;
  }
  sync();
  if (threadIdx.x < ATTENTION_KINDS) {
    int* first_task = first_tasks(threadIdx.x);
    first_task[0] = 0;
#pragma unroll 1
    for (int row = 0; row < rows(); row++) first_task[row + 1] += first_task[row];
  }
  sync();
}

struct Task {
  int row, head, split, splits, at, first, end;  // first to end: pages
  int from;                                      // the first position that is seen

  // `row` is that of the last task, or 0.
  __device__ void find(int task, bool windowed) {
    const int* first_task = first_tasks(windowed);
    while (task >= first_task[row + 1]) row++;
    head = (task - first_task[row]) % KV_HEADS, split = (task - first_task[row]) / KV_HEADS;
    const Sight sight(positions()[row], windowed);
    at = sight.at, from = sight.from, splits = sight.splits();
    const int each = sight.of_split();
    first = sight.first() + split * each, end = min(first + each, sight.end());
  }
  __device__ bool is_last() const { return end == at / PAGE + 1; }
};

// Of a page, what a lane has: of two positions the keys' numbers t * 8 .. + 8 of every 32, and of eight positions
// (t * 8 of both halves) the values' numbers g of its warp's tiles.
struct Keys {
  uint4 numbers[2][DIM / 32];
};
struct Values {
  uint4 numbers[OWN_VALUES][2];
};

__device__ inline const bf16* keys_in(const Task& task, int index, int layer) {
  return in_page(planned(task.row)[ROW_WORDS + index], layer, 0, task.head) + tile_column() * 8;
}
__device__ inline const bf16* values_in(const Task& task, int index, int layer) {
  return in_page(planned(task.row)[ROW_WORDS + index], layer, 1, task.head) + (size_t)warp() % TEAM_WARPS * OWN_VALUES * 8 * PAGE;
}

// `older` positions of the page were there before.
__device__ inline void read_keys(const bf16* from, int older, Keys& keys) {
#pragma unroll
  for (int tile = 0; tile < 2; tile++) {
    const int position = warp() % TEAM_WARPS * 16 + tile * 8 + tile_row();
#pragma unroll
    for (int i = 0; i < DIM / 32; i++) {
      keys.numbers[tile][i] = make_uint4(0, 0, 0, 0);
      if (position < older) keys.numbers[tile][i] = *reinterpret_cast<const uint4*>(from + position * DIM + i * 32);
    }
  }
}

__device__ inline void read_values(const bf16* from, int older, Values& values) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int position = half * 32 + tile_column() * 8;
#pragma unroll
    for (int i = 0; i < OWN_VALUES; i++) {
      values.numbers[i][half] = make_uint4(0, 0, 0, 0);
      if (position < older)
        values.numbers[i][half] = *reinterpret_cast<const uint4*>(from + (i * 8 + tile_row()) * PAGE + position);
    }
  }
}

// Two neighbouring numbers, of which the first `older` are there, and the next is another.
__device__ inline unsigned two_of(unsigned old, int older, bf16 fresh) {
  if (older >= 2) return old;
  return older == 1 ? (old & 0xffff) | (unsigned)fresh << 16 : older == 0 ? fresh : 0;
}

// The row's own key behind the older ones.
__device__ inline void add_fresh_key(const Team& memory, int older, Keys& keys) {
#pragma unroll
  for (int tile = 0; tile < 2; tile++)
    if (warp() % TEAM_WARPS * 16 + tile * 8 + tile_row() == older)
#pragma unroll
      for (int i = 0; i < DIM / 32; i++)
        keys.numbers[tile][i] = *reinterpret_cast<const uint4*>(memory.fresh[0] + i * 32 + tile_column() * 8);
}

// Its value, and nothing after it.
__device__ inline void add_fresh_value(const Team& memory, int older, Values& values) {
  const int team_warp = warp() % TEAM_WARPS;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int behind = older - half * 32 - tile_column() * 8;
    if (behind >= 8) continue;
#pragma unroll
    for (int i = 0; i < OWN_VALUES; i++) {
      const bf16 number = memory.fresh[1][(team_warp * OWN_VALUES + i) * 8 + tile_row()];
      uint4& own = values.numbers[i][half];
      own.x = two_of(own.x, behind, number), own.y = two_of(own.y, behind - 2, number);
      own.z = two_of(own.z, behind - 4, number), own.w = two_of(own.w, behind - 6, number);
    }
  }
}

// The norms of queries and keys, as `norm_head` takes them.
struct HeadNorms {
  bf16 numbers[2][DIM / 32];

  __device__ explicit HeadNorms(int layer) {
    if (!QK_NORM) return;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int j = 0; j < DIM / 32; j++) numbers[i][j] = weight<bf16>(layer, i ? K_NORM : Q_NORM)[lane() + 32 * j];
  }
};

// Queries of a row's head of keys, and the key and value of the row itself: to memory, those also to their
// page if this is the last split.
__device__ inline void prepare_heads(Team& memory, const HeadNorms& norms, const Task& task, int layer) {
  const int team_warp = warp() % TEAM_WARPS;
  const bool last = task.is_last();
  const float* from = qkv() + (size_t)task.row * QKV_WIDTH;
  Angle own_angles[DIM / 64];
#pragma unroll
  for (int i = 0; i < DIM / 64; i++) own_angles[i] = angles(rotation(layer))[task.row * (DIM / 2) + lane() + 32 * i];
  // Heads of queries, then the key and the value.
#pragma unroll 1
  for (int i = team_warp; i < GQA_GROUP + (last ? 2 : 0); i += TEAM_WARPS) {
    const int kind = i - GQA_GROUP;
    const int column = kind < 0 ? (task.head * GQA_GROUP + i) * DIM : Q_WIDTH + kind * KV_WIDTH + task.head * DIM;
    float x[DIM / 32];
#pragma unroll
    for (int j = 0; j < DIM / 32; j++) x[j] = from[column + lane() + 32 * j];
    if (QK_NORM && kind < 1) {
      float norm[DIM / 32];
#pragma unroll
      for (int j = 0; j < DIM / 32; j++) norm[j] = widen(kind < 0 ? norms.numbers[0][j] : norms.numbers[1][j]);
      norm_head<DIM>(x, norm, eps());
    }
    if (kind < 1 && !unrotated(layer)) rotate_head<DIM>(x, own_angles);
    if (QUERY_BETA_BITS && kind < 0)
#pragma unroll
      for (int j = 0; j < DIM / 32; j++) x[j] *= query_factor(task.at, (int)QUERY_BETA_BITS, QUERY_CONTEXT);
    bf16* to = kind < 0 ? memory.q[i] : memory.fresh[kind];
#pragma unroll
    for (int j = 0; j < DIM / 32; j++) to[lane() + 32 * j] = narrow(x[j]);
    if (kind < 0) continue;
    bf16* page = in_page(planned(task.row)[ROW_WORDS + task.at / PAGE], layer, kind, task.head);
#pragma unroll
    for (int j = 0; j < DIM / 32; j++) {
      const int number = lane() + 32 * j;
      page[kind == 0 ? task.at % PAGE * DIM + number : number * PAGE + task.at % PAGE] = to[number];
    }
  }
}

// What a warp has found so far, of head g: in powers of 2.
struct Found {
  float largest, sum, values[OWN_VALUES][2];
};

__device__ inline void score_page(Team& memory, int page, const Keys& keys) {
  float scores[2][2] = {};
#pragma unroll
  for (int i = 0; i < DIM / 32; i++) {
    const uint4 q = *reinterpret_cast<const uint4*>(memory.q[tile_row()] + i * 32 + tile_column() * 8);
#pragma unroll
    for (int tile = 0; tile < 2; tile++) {
      const uint4 k = keys.numbers[tile][i];
      multiply_upper(scores[tile], q.x, q.y, k.x, k.y);
      multiply_upper(scores[tile], q.z, q.w, k.z, k.w);
    }
  }
  const float scale = score_factor(DIM, (int)SCORE_FACTOR_BITS);
#pragma unroll
  for (int tile = 0; tile < 2; tile++) {
    float* to = memory.scores[page % 2][tile_row()] + warp() % TEAM_WARPS * 16 + tile * 8 + tile_column() * 2;
    *reinterpret_cast<float2*>(to) = make_float2(scores[tile][0] * scale, scores[tile][1] * scale);
  }
}

// Positions from `hidden` to `seen` count.
__device__ inline void mix_page(const Team& memory, int page, int hidden, int seen, const Values& values,
                                Found& found) {
  float scores[2][8], largest = found.largest;
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int position = half * 32 + tile_column() * 8 + i;
      const bool counts = position < seen && !(WINDOW && position < hidden);
      scores[half][i] = counts ? memory.scores[page % 2][tile_row()][position] : LEAST;
      largest = fmaxf(largest, scores[half][i]);
    }
  largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 1));
  largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 2));
  const float fade = exp2f(found.largest - largest);
  found.largest = largest;
  found.sum *= fade;
#pragma unroll
  for (int i = 0; i < OWN_VALUES; i++) found.values[i][0] *= fade, found.values[i][1] *= fade;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    unsigned weights[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float one = exp2f(scores[half][2 * i] - largest), other = exp2f(scores[half][2 * i + 1] - largest);
      found.sum += one + other;
      weights[i] = pack_bf16(one, other);
    }
#pragma unroll
    for (int i = 0; i < OWN_VALUES; i++) {
      const uint4 v = values.numbers[i][half];
      multiply_upper(found.values[i], weights[0], weights[1], v.x, v.y);
      multiply_upper(found.values[i], weights[2], weights[3], v.z, v.w);
    }
  }
}

// Of a row's head of keys, what a thread has of the output.
constexpr int OWN_OUTPUTS = (GQA_GROUP * DIM + TEAM - 1) / TEAM;
__device__ inline int own_output(int i) { return threadIdx.x % TEAM + i * TEAM; }

// a of the next product for them, for eight of the rank.
struct MixedSide {
  LoraMatrix matrix;
  word* to;  // what of x a^T the lane adds to
  uint4 a[OWN_OUTPUTS];

  __device__ void prefetch(const Task& task, int i, int rank) {
    a[i] = eight_of(matrix, task.head * GQA_GROUP * DIM + min(own_output(i), GQA_GROUP * DIM - 1), rank);
  }
};

// The output of a row's head of keys, which the team has in its memory, to where the next product finds it; and what it
// adds to that product's x a^T.
__device__ inline void set_mixed(Team& memory, const Task& task, MixedSide& next) {
  team_sync(warp() / TEAM_WARPS, TEAM);
  float x[OWN_OUTPUTS];
#pragma unroll
  for (int i = 0; i < OWN_OUTPUTS; i++) {
    const int k = own_output(i);
    const bf16 own = k < GQA_GROUP * DIM ? narrow(memory.output[k]) : 0;
    if (k < GQA_GROUP * DIM) mixed()[swizzled(task.row, task.head * GQA_GROUP * DIM + k, Q_WIDTH)] = own;
    x[i] = widen(own);
  }
#pragma unroll 1
  for (int rank = 0; rank < next.matrix.rank; rank += 8) {
    float sums[8] = {};
#pragma unroll
    for (int i = 0; i < OWN_OUTPUTS; i++) {
      add_times(sums, x[i], next.a[i]);
      next.prefetch(task, i, rank + 8);
    }
    float sum = reduce_column(sums);
    sum += __shfl_xor_sync(0xffffffff, sum, 1);
    sum += __shfl_xor_sync(0xffffffff, sum, 2);
    add_fixed(tile_column() == 0, next.to + rank, sum);
  }
}

// What was found of a task, to the team's memory, or to where the splits of a row's head meet.
__device__ inline void put_down(Team& memory, const Task& task, Found& found) {
  found.sum += __shfl_xor_sync(0xffffffff, found.sum, 1);
  found.sum += __shfl_xor_sync(0xffffffff, found.sum, 2);
  team_sync(warp() / TEAM_WARPS, TEAM);  // scores have been used
  if (tile_row() >= GQA_GROUP) return;
  const int team_warp = warp() % TEAM_WARPS;
  float* to = task.splits > 1 ? split_at(task.row, task.head, task.split, tile_row()) : memory.output + tile_row() * DIM;
  const float factor = task.splits > 1 ? 1.f : 1.f / found.sum;
#pragma unroll
  for (int i = 0; i < OWN_VALUES; i++)
#pragma unroll
    for (int j = 0; j < 2; j++)
      to[(team_warp * OWN_VALUES + i) * 8 + tile_column() * 2 + j] = found.values[i][j] * factor;
  if (task.splits > 1 && team_warp == 0 && tile_column() == 0) to[DIM] = found.largest, to[DIM + 1] = found.sum;
}

// Whoever is the last of a row's head joins what all splits found, in the team's memory.
__device__ inline bool join(Team& memory, const Task& task) {
  const int team = warp() / TEAM_WARPS, thread = threadIdx.x % TEAM;
  __threadfence();
  team_sync(team, TEAM);
  unsigned* done = attended() + task.row * KV_HEADS + task.head;
  if (thread == 0) memory.last[0] = fetch_add(done, 1) + 1 == (unsigned)task.splits;
  team_sync(team, TEAM);
  if (!memory.last[0]) return false;
  if (thread == 0) *done = 0;
  __threadfence();
  // How much each split counts.
#pragma unroll 1
  for (int h = thread / 32; h < GQA_GROUP; h += TEAM_WARPS) {
    const float* own = split_at(task.row, task.head, min(lane(), task.splits - 1), h) + DIM;
    const float largest = lane() < task.splits ? own[0] : LEAST;
    const float weight_of_split = exp2f(largest - warp_max(largest));
    const float total = warp_sum(lane() < task.splits ? weight_of_split * own[1] : 0.f);
    memory.weights[h][lane()] = weight_of_split / total;
  }
  team_sync(team, TEAM);
#pragma unroll 1
  for (int i = thread; i < GQA_GROUP * DIM; i += TEAM) {
    const int h = i / DIM, d = i % DIM;
    float sum = 0.f;
#pragma unroll 4
    for (int split = 0; split < task.splits; split++)
      sum += memory.weights[h][split] * split_at(task.row, task.head, split, h)[d];
    memory.output[i] = sum;
  }
  return true;
}

// After the barrier that it waits for there are q, k and v of all rows; older keys and values are asked for
// before.
__device__ __noinline__ void attend(int layer) {
  const bool in_window = windowed(layer);
  const int team = warp() / TEAM_WARPS, tasks = first_tasks(in_window)[rows()];
  Team& memory = team_memory(team);
  const Product at(layer * PRODUCTS);  // that of q, k and v
  Task task = {};
  const HeadNorms norms(layer);
  bool waited = false;
#pragma unroll 1
  for (int number = blockIdx.x + gridDim.x * team; number < tasks; number += gridDim.x * TEAMS) {
    task.find(number, in_window);
    Found found = {LEAST, 0.f, {}};
#pragma unroll 1
    for (int page = task.first; page < task.end; page++) {
      const int older = min(task.at - page * PAGE, PAGE);
      Keys keys;
      Values values;
      read_keys(keys_in(task, page, layer), older, keys);
      const bf16* v = values_in(task, page, layer);
      // Each of a warp's lines.
      for (int i = lane(); i < OWN_VALUES * 8; i += 32) prefetch(v + i * PAGE);
      if (page == task.first) {
        if (!waited) wait_grid_here();
        waited = true;
        prepare_heads(memory, norms, task, layer);
      }
      if (!VALUES_LATE) read_values(v, older, values);
      if (page == task.first) team_sync(team, TEAM);
      if (older < PAGE) add_fresh_key(memory, older, keys);
      if (!VALUES_LATE && older < PAGE) add_fresh_value(memory, older, values);
      score_page(memory, page, keys);
      if (VALUES_LATE) read_values(v, older, values);
      if (VALUES_LATE && older < PAGE) add_fresh_value(memory, older, values);
      team_sync(team, TEAM);
      mix_page(memory, page, task.from - page * PAGE, min(older + 1, PAGE), values, found);
    }
    // Not by blocks: whichever joins the splits, the numbers must be the same.
    MixedSide next = {adapted() ? lora_a(at, task.row, 0) : LoraMatrix{},
                      low_rank(at.number + 1, task.head & (shards() - 1), task.row) + tile_row()};
#pragma unroll
    for (int i = 0; i < OWN_OUTPUTS; i++) next.prefetch(task, i, 0);
    put_down(memory, task, found);
    if (task.splits == 1 || join(memory, task)) set_mixed(memory, task, next);
  }
  if (!waited) wait_grid();
}
