// Producer warps bring weights and inputs into shared memory, ahead of their use.
//
//   stage      full[i]: a producer's bytes have arrived        empty[i]: all compute warps have read it
//   producer:  wait(empty[i]) -> copy_bulk ...... arrives at full[i]
//   computing: wait(full[i])  -> multiply ....... arrive(empty[i])
//
// Weights come in the order in which the block takes them, over the whole model. Their producer waits for free stages
// and for nobody else: so they also come while the blocks wait for each other. A single warp issues them with the copy
// engine, which takes no registers of those that multiply. (With several batches of rows a unit comes again at once,
// for which it need not be kept: bench/README.md.)
//
// Inputs, with more tiles than one, have a producer of their own, since they are there only behind a barrier.

// A weight [n, k], in units of outputs and chunks of inputs. Of gate and up, up begins after so many outputs.
struct WeightStream {
  const word* at;
  int n, k, units, chunks, up;
};

template <class D> __device__ __noinline__ int produce_stages(WeightStream weight, int used) {
  const Matrix w = {reinterpret_cast<const unsigned*>(weight.at[0]), reinterpret_cast<const unsigned*>(weight.at[1])};
  const int quads = (weight.k / GROUP + 3) / 4;
#pragma unroll 1
  for (int unit = blockIdx.x; unit < weight.units; unit += gridDim.x)
#pragma unroll 1
    for (int batch = 0; batch < batches(); batch++)
#pragma unroll 1
      for (int chunk = 0; chunk < weight.chunks; chunk++, used++) {
        const int slot = used % STAGES;
        Barrier* full = &signals().full[slot];
        if (used >= STAGES) wait(&signals().empty[slot], used / STAGES - 1 & 1);
        if (lane() == 0) arrive_expecting(full, D::TALL * D::ROW + D::HIGH * D::SCALE_BIAS_BYTES);
        __syncwarp();
        unsigned char* to = stage(slot);
#pragma unroll 1
        for (int row = lane(); row < D::TALL; row += 32) {
          const int tile = unit * D::HIGH + row / 16;
          const int output = weight.up ? tile * 8 + row % 8 + row % 16 / 8 * weight.up : tile * 16 + row % 16;
          const size_t n = min(output, weight.n - 1);
          copy_bulk_once(to + row * D::STRIDE, w.codes + n * (weight.k / 8) + chunk * D::AT_ONCE * 8, D::ROW, full);
        }
        const int tile = 31 - lane();
        if (tile < D::HIGH) {
          const size_t quad = ((size_t)unit * D::HIGH + tile) * quads + chunk * (D::AT_ONCE / 4);
          copy_bulk_once(to + D::TALL * D::STRIDE + tile * D::SCALE_BIAS_BYTES, w.scales_biases + quad * 64, D::SCALE_BIAS_BYTES, full);
        }
      }
  return used;
}

template <class D> __device__ void produce_weights(const word* at, int& used) {
  used = produce_stages<Staged<D>>({at, D::N, D::K, D::UNITS, D::CHUNKS, D::kind == SWIGLU ? D::N / 2 : 0}, used);
}

__device__ __noinline__ void produce_all_weights() {
  int used = 0;
#pragma unroll 1
  for (int layer = 0; layer < LAYERS; layer++) {
    const word* own = state().table + layer * LAYER_WORDS;
    produce_weights<Qkv>(own + QKV, used);
    produce_weights<Output>(own + O, used);
    produce_weights<GateUp>(own + GATE_UP, used);
    produce_weights<Down>(own + DOWN, used);
  }
  produce_weights<Head>(state().table + LAYERS * LAYER_WORDS + HEAD, used);
}

// A product's inputs, once they are there.
template <class D> __device__ void produce_inputs(const bf16* x, int round, int& used) {
  constexpr int AT_ONCE = D::INPUTS_AT_ONCE;
  wait(&signals().inputs_ready, round & 1);
  fence_copies();
#pragma unroll 1
  for (int unit = blockIdx.x; unit < D::UNITS; unit += gridDim.x)
#pragma unroll 1
    for (int batch = 0; batch < batches(); batch++) {
      const int tiles = min((rows() - batch * ROWS + 7) / 8, TILES);
#pragma unroll 1
      for (int group = 0; group < D::GROUPS; group += AT_ONCE, used++) {
        const int slot = used % INPUT_STAGES;
        Barrier* full = &signals().inputs_full[slot];
        if (used >= INPUT_STAGES)
          wait(&signals().inputs_empty[slot], used / INPUT_STAGES - 1 & 1);
        if (lane() == 0) arrive_expecting(full, tiles * AT_ONCE * 1024);
        __syncwarp();
        if (lane() < tiles) {
          const size_t from = ((size_t)(batch * TILES + lane()) * D::GROUPS + group) * 512;
          copy_bulk(inputs(slot) + lane() * AT_ONCE * 64, x + from, AT_ONCE * 1024, full);
        }
      }
    }
}

__device__ __noinline__ void produce_all_inputs() {
  int used = 0;
#pragma unroll 1
  for (int layer = 0; layer < LAYERS; layer++) {
    produce_inputs<Qkv>(normed(), layer * 4, used);
    produce_inputs<Output>(mixed(), layer * 4 + 1, used);
    produce_inputs<GateUp>(normed(), layer * 4 + 2, used);
    produce_inputs<Down>(active(), layer * 4 + 3, used);
  }
  produce_inputs<Head>(normed(), LAYERS * 4, used);
}
