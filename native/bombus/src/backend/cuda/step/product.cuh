// A product is y = x w^T, with w in 4 bits and groups of 64, on tensor cores: outputs are the rows of a tile, rows of
// x its columns. The phase before wrote x `swizzled`, so that a lane reads what it feeds to a tensor core as 16 bytes.
//
// Up to eight rows (`multiply_one_tile`): codes c become the bfloat16 128 + c by two bit operations and are multiplied
// as they are. y = scale * (dots - 128 * total) + bias * total then takes one multiplication for each group, where
// `total` is the group's sum of x, which a product with ones gives. The 16 warps split K, and epilogue warps add up
// their sums.
//
// More rows (`multiply_tiles`): weights are dequantized to bfloat16 first, once for all tiles, as MLX has them.
// Several warps split K where a unit has fewer tiles of outputs than there are warps.
//
// Units of outputs go to blocks round-robin. The epilogue is a template argument: see epilogue.cuh.

constexpr unsigned ONES = 0x3f803f80;  // as bfloat16

// Scale and bias of an output in a group.
struct ScaleBias {
  unsigned both;
  __device__ float scale() const { return low(both); }
  __device__ float bias() const { return high(both); }
};

template <class D> __device__ ScaleBias scale_bias_at(const unsigned char* scales_biases, int row, int group) {
  const unsigned char* tile = scales_biases + row / 16 * D::SCALE_BIAS_BYTES + (group / 4 * 16 + row % 16) * 16;
  return {reinterpret_cast<const unsigned*>(tile)[group % 4]};
}

// What a warp has of one tile of rows: some groups of a stage, and the sum of each, which the bias is multiplied
// with.
template <class D> struct Inputs {
  static constexpr int OWN = (D::AT_ONCE + WARPS - 1) / WARPS;
  uint4 numbers[OWN][2];
  float totals[OWN][2];

  __device__ void read(const bf16* x, int chunk) {
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      const int group = warp() * OWN + i;
      const uint4* own = reinterpret_cast<const uint4*>(x) + (size_t)(chunk * D::AT_ONCE + group) * 64 + lane();
      numbers[i][0] = numbers[i][1] = make_uint4(0, 0, 0, 0);
      if (tile_row() < rows() && group < D::AT_ONCE) numbers[i][0] = own[0], numbers[i][1] = own[32];
    }
  }

  __device__ void add_up() {
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      float total[4] = {};
#pragma unroll
      for (int half = 0; half < 2; half++) {
        multiply(total, ONES, ONES, ONES, ONES, numbers[i][half].x, numbers[i][half].y);
        multiply(total, ONES, ONES, ONES, ONES, numbers[i][half].z, numbers[i][half].w);
      }
      totals[i][0] = total[0], totals[i][1] = total[1];
    }
  }
};

template <class D>
__device__ void multiply_stage(float (&sums)[4], const Inputs<D>& inputs, const unsigned char* stage) {
  const unsigned char* scales_biases = stage + D::TALL * D::STRIDE;
  constexpr int OWN = Inputs<D>::OWN;
  uint4 four[2];
  if (OWN == 4)
    for (int r = 0; r < 2; r++) four[r] = reinterpret_cast<const uint4*>(scales_biases)[warp() * 16 + r * 8 + tile_row()];
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    const int group = warp() * OWN + i;
    if (D::AT_ONCE % WARPS && group >= D::AT_ONCE) break;
    uint2 codes[2];
    ScaleBias both[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = r * 8 + tile_row();
      codes[r] = reinterpret_cast<const uint2*>(stage + row * D::STRIDE)[group * 4 + tile_column()];
      if (OWN != 4) both[r] = scale_bias_at<D>(scales_biases, row, group);
      else both[r].both = i == 0 ? four[r].x : i == 1 ? four[r].y : i == 2 ? four[r].z : four[r].w;
    }
    float dots[4] = {};
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const unsigned a = half ? codes[0].y : codes[0].x, b = half ? codes[1].y : codes[1].x;
      const uint4 x = inputs.numbers[i][half];
      multiply(dots, widened(a, 0), widened(b, 0), widened(a, 4), widened(b, 4), x.x, x.y);
      multiply(dots, widened(a, 8), widened(b, 8), widened(a, 12), widened(b, 12), x.z, x.w);
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float scale = both[j / 2].scale();
      sums[j] += scale * dots[j] + (both[j / 2].bias() - 128.f * scale) * inputs.totals[i][j % 2];
    }
  }
}

// 1 / root mean square of rows, each by a warp, from their `squares`.
__device__ inline void find_factors(const float* squares, int first, int step) {
#pragma unroll 1
  for (int row = first; row < rows(); row += step) {
    const float* own = squares + (size_t)row * (HIDDEN / 16);
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < (HIDDEN / 16 + 31) / 32; i++)
      if (i * 32 + lane() < HIDDEN / 16) sum += own[i * 32 + lane()];
    sum = warp_sum(sum);
    if (lane() == 0) factors()[row] = rsqrtf(sum / HIDDEN + eps());
  }
  __syncwarp();
}

// How far a block is: stages of weights and of inputs that have been used, units of outputs that are done.
struct Progress {
  int used, inputs_used, units;
};

// A tile's sums: those of a lane's first row, and of its second.
__device__ inline void put_sums(float2* to, const float (&sum)[4]) {
  to[lane()] = make_float2(sum[0], sum[2]), to[32 + lane()] = make_float2(sum[1], sum[3]);
}

// So many vectors of two, each so far from the last.
template <int COUNT, int APART> __device__ inline float2 add_up(const float2* from) {
  float2 y = make_float2(0.f, 0.f);
#pragma unroll
  for (int i = 0; i < COUNT; i++) y.x += from[i * APART].x, y.y += from[i * APART].y;
  return y;
}

// Up to eight rows: the warps share the inputs, and take a stage without waiting for each other.
template <class D, bool CHUNKED>
__device__ __noinline__ Progress multiply_one_tile(Progress progress, const bf16* x, int units, int chunks) {
  Inputs<D> inputs;
  if (!CHUNKED) {
    inputs.read(x, 0);
    inputs.add_up();
  }
#pragma unroll 1
  for (int unit = blockIdx.x; unit < units; unit += gridDim.x, progress.units++) {
    float sum[4] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < (CHUNKED ? chunks : 1); chunk++, progress.used++) {
      const int slot = progress.used % STAGES;
      if (CHUNKED) inputs.read(x, chunk);
      wait(&signals().full[slot], progress.used / STAGES & 1);
      if (CHUNKED) inputs.add_up();
      multiply_stage<D>(sum, inputs, stage(slot));
      __syncwarp();
      if (lane() == 0) arrive(&signals().empty[slot]);
    }
    const int buffer = progress.units % SUMS;
    if (progress.units >= SUMS) wait(&signals().taken[buffer], progress.units / SUMS - 1 & 1);
    put_sums(sums_of(buffer, warp()), sum);
    __syncwarp();
    if (lane() == 0) arrive(&signals().summed[buffer]);
  }
  return progress;
}

// Those from output `from` of a unit on, of row `first` and every other behind it.
template <class D> __device__ Outputs outputs_in(int unit, int from, int first) {
  from += tile_row();
  return {{D::output(unit, from), D::output(unit, from + 8)}, first + 2 * tile_column()};
}

// What all warps have of a unit: of one row, by lanes of which four share the warps and all get the sums of the first.
__device__ inline float2 add_up_row(int buffer) {
  float2 y = add_up<WARPS / 4, 4 * OWN_SUMS>(sums_of(buffer, tile_column()) + 4 * tile_row());
#pragma unroll
  for (int other = 1; other < 4; other *= 2) {
    y.x += __shfl_xor_sync(0xffffffff, y.x, other);
    y.y += __shfl_xor_sync(0xffffffff, y.y, other);
  }
  return y;
}
// Of several: b of them.
__device__ inline float2 add_up_rows(int buffer, int b) {
  return add_up<WARPS, OWN_SUMS>(sums_of(buffer, 0) + b * 32 + lane());
}

// If there is one row, each of the warps for every third unit, else two of them, each for half of the rows, add up what
// the others have, and run the epilogue. What they need besides is prefetched before they wait. Whichever is done first, or has
// nothing to do, clears the sums of x a^T that come next.
template <class D, class Epilogue>
__device__ __noinline__ Progress epilogue_one_tile(Progress progress, Epilogue epilogue) {
  const bool alone = Epilogue::SPECIAL == ONE_ROW || (Epilogue::SPECIAL == NONE && rows() == 1);
  const int units = (int)blockIdx.x < D::UNITS ? (D::UNITS - 1 - blockIdx.x) / gridDim.x + 1 : 0;
  const int own = warp() - WARPS, stride = alone ? EPILOGUE_WARPS : 1;
  const int b = alone ? 0 : own, end = b < 2 ? units : 0;
  typename Epilogue::Operands operands;
  bool begun = false;
#pragma unroll 1
  for (int i = alone ? own : 0; i < end || !begun; i += stride) {
    forget(epilogue.number);
    const Outputs out = outputs_in<D>(min(blockIdx.x + i * gridDim.x, D::UNITS - 1), 0, b);
    operands.prefetch(epilogue, out);
    if (!begun) wait_inputs_here();
    const bool loads = !begun || Epilogue::KINDS > 1;
    if (loads) operands.load(epilogue, out);
    if (!begun) {
      if (D::NORMED && b < 2) find_factors(squares(), b, 2);
      begun = true;
      if (i >= end) break;
    }
    operands.prepare(epilogue, out, loads);
    const int buffer = (progress.units + i) % SUMS;
    wait(&signals().summed[buffer], (progress.units + i) / SUMS & 1);
    const float2 y = alone ? add_up_row(buffer) : add_up_rows(buffer, b);
    __syncwarp();
    if (lane() < (alone ? 2 : 1)) arrive(&signals().taken[buffer]);
    epilogue(out, y, operands);
  }
  // Of three that follow each other, one can be divided by three.
  if (Epilogue::SPECIAL != NONE && (alone ? (units - own) % stride == 0 : own == EPILOGUE_WARPS - 1))
    clear_low_rank(epilogue.number, lane(), 32);
  progress.units += units;
  return progress;
}

// 16 outputs and a group of 64 inputs as bfloat16, as MLX has them in products of many rows.
struct Dense {
  unsigned fragments[4][4];

  template <class D> __device__ void read(const unsigned char* stage, int tall, int group) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = tall * 16 + r * 8 + tile_row();
      const uint2 codes = reinterpret_cast<const uint2*>(stage + row * D::STRIDE)[group * 4 + tile_column()];
      const unsigned scales_biases = scale_bias_at<D>(stage + D::TALL * D::STRIDE, row, group).both;
      const unsigned scale = twice_low(scales_biases), bias = twice_high(scales_biases);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const unsigned two = widened(i < 4 ? codes.x : codes.y, i % 4 * 4);
        fragments[i / 2][i % 2 * 2 + r] = multiply_add(subtract(two, OFFSET), scale, bias);
      }
    }
  }
};

// Once all have put theirs down, adds up what the warps have of a unit for a batch of rows, and runs the epilogue. Apart from
// the rest, whose registers it would take.
template <class D, class Epilogue> __device__ __noinline__ void epilogue_tiles(int unit, int batch, Epilogue epilogue) {
  constexpr int SLICES = WARPS / D::HIGH;
  const int tasks = 2 * min((rows() - batch * ROWS + 7) / 8, TILES) * D::HIGH;
  bool met = false;
#pragma unroll 1
  for (int task = warp(); task < tasks || !met; task += WARPS) {
    const int b = task % 2, high = task / 2 % D::HIGH, tile = task / 2 / D::HIGH;
    const Outputs out = outputs_in<D>(unit, high * 16, batch * ROWS + tile * 8 + b);
    typename Epilogue::Operands operands;
    operands.prefetch(epilogue, out);
    if (!met) sync();
    met = true;
    if (task >= tasks) break;
    operands.load(epilogue, out);
    operands.prepare(epilogue, out, true);
    const float2* from = sums_of(0, high) + (tile * 2 + b) * 32 + lane();
    epilogue(out, add_up<SLICES, D::HIGH * OWN_SUMS>(from), operands);
  }
}

// More rows: a block takes TALL outputs and ROWS rows at once; of 16 outputs, several warps share the inputs.
template <class D, class Epilogue>
__device__ __noinline__ Progress multiply_tiles(Progress progress, Epilogue epilogue) {
  constexpr int SLICES = WARPS / D::HIGH, AT_ONCE = D::INPUTS_AT_ONCE;
  const int tall = warp() % D::HIGH, slice = warp() / D::HIGH;
  bool begun = false;
  if (Epilogue::SPECIAL != NONE && batches() == 1) keep_low_rank(Product(epilogue.number), 0);
#pragma unroll 1
  for (int unit = blockIdx.x; unit < D::UNITS; unit += gridDim.x)
#pragma unroll 1
    for (int batch = 0; batch < batches(); batch++) {
      float sum[TILES][4] = {};
#pragma unroll 1
      for (int chunk = 0; chunk < D::CHUNKS; chunk++, progress.used++) {
        const int slot = progress.used % STAGES;
        wait(&signals().full[slot], progress.used / STAGES & 1);
#pragma unroll 1
        for (int first = 0; first < D::AT_ONCE; first += AT_ONCE, progress.inputs_used++) {
          const int input = progress.inputs_used % INPUT_STAGES;
          wait(&signals().inputs_full[input], progress.inputs_used / INPUT_STAGES & 1);
          const uint4* x = inputs(input) + lane();
#pragma unroll 1
          for (int group = slice; group < AT_ONCE; group += SLICES) {
            Dense weight;
            weight.read<D>(stage(slot), tall, first + group);
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
              for (int half = 0; half < 2; half++) {
                const uint4 own = x[(tile * AT_ONCE + group) * 64 + half * 32];  // of absent rows, anything
                const auto& a = weight.fragments[half * 2];
                const auto& b = weight.fragments[half * 2 + 1];
                multiply(sum[tile], a[0], a[1], a[2], a[3], own.x, own.y);
                multiply(sum[tile], b[0], b[1], b[2], b[3], own.z, own.w);
              }
            }
          }
          __syncwarp();
          if (lane() == 0) arrive(&signals().inputs_empty[input]);
        }
        if (lane() == 0) arrive(&signals().empty[slot]);
      }
      if (!begun) {
        if (D::NORMED) find_factors(squares(), warp(), WARPS);
        begun = true;
      }
      sync();  // those of the last unit have been used
      if (Epilogue::SPECIAL != NONE && batches() > 1) keep_low_rank(Product(epilogue.number), batch);
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) put_sums(sums_of(0, warp()) + tile * 64, sum[tile]);
      epilogue_tiles<D>(unit, batch, epilogue);
    }
  return progress;
}

template <class D, class Epilogue>
__device__ Progress project_as(Progress progress, const bf16* x, const Epilogue& epilogue) {
  if (TILES == 1 && warp() >= WARPS) return epilogue_one_tile<EpilogueShape<D>>(progress, epilogue);
  if (TILES > 1 && Epilogue::SPECIAL != NONE) {
    keep_matrices(Product(epilogue.number));
    clear_low_rank(epilogue.number, threadIdx.x, THREADS);
  }
  wait_inputs();
  if constexpr (TILES > 1) return multiply_tiles<D>(progress, epilogue);
  else return multiply_one_tile<Staged<D>, (D::CHUNKS > 1)>(progress, x, D::UNITS, D::CHUNKS);
}

// A phase, from the barrier before it to that after it.
template <class D, class Epilogue> __device__ void project(Progress& progress, const bf16* x, const Epilogue& epilogue) {
  progress = project_as<D>(progress, x, epilogue);
  arrive_grid();
}

// One that adapters may change: the epilogue depends on whether there are any.
template <class D, template <Specialization> class Epilogue, class... More>
__device__ void project_adapted(Progress& progress, const bf16* x, More... more) {
  if (!adapted()) project<D>(progress, x, Epilogue<NONE>{more...});
  else if (TILES == 1 && rows() == 1) project<D>(progress, x, Epilogue<ONE_ROW>{more...});
  else project<D>(progress, x, Epilogue<ROWS_BY_LANES>{more...});
}
