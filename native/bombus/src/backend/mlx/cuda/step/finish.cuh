// What becomes of a product's outputs, of which a lane has two of a row (of gate and up one each): `ahead` asks for what is
// needed besides them.

// All lanes of a warp come here, with the same 16 outputs, for 4 rows. The input of the next product is normed but for
// a factor of the row, which needs all of it.
__device__ inline void set_hidden(int row, int n0, int n1, float x0, float x1,
                                  bf16 norm0, bf16 norm1) {
  float square = x0 * x0 + x1 * x1;
  for (int other = 4; other < 32; other *= 2) square += __shfl_xor_sync(0xffffffff, square, other);
  if (row >= rows()) return;
  float* own = hidden() + (size_t)row * HIDDEN;
  own[n0] = x0, own[n1] = x1;
  normed()[placed(row, n0, HIDDEN)] = narrow(x0 * widen(norm0));
  normed()[placed(row, n1, HIDDEN)] = narrow(x1 * widen(norm1));
  if (tile_row() == 0) squares()[(size_t)row * (HIDDEN / 16) + n0 / 16] = square;
}

// Which of q, k and v an output is of, and where that begins.
__device__ inline int part_of(int n) { return n < Q_WIDTH ? 0 : n < Q_WIDTH + KV_WIDTH ? 1 : 2; }
__device__ inline int start_of(int part) { return part == 0 ? 0 : part == 1 ? Q_WIDTH : Q_WIDTH + KV_WIDTH; }

struct FinishQkv {
  static constexpr int PARTS = 3, place = LORA_QKV;
  int layer;

  struct Ahead {
    Expansion first, second;
  };

  template <class A> __device__ Ahead ahead(const A& adapted, int, int n0, int n1) const {
    const int part0 = part_of(n0), part1 = part_of(n1);
    return {{adapted, part0, n0 - start_of(part0)}, {adapted, part1, n1 - start_of(part1)}};
  }

  template <class A>
  __device__ void operator()(const A& adapted, int row, int n0, int n1, float y0, float y1,
                             const Ahead& own) const {
    if (row >= rows()) return;
    float* to = qkv() + (size_t)row * QKV_WIDTH;
    const float factor = factors()[row];
    to[n0] = factor * (y0 + own.first.times(adapted, row, part_of(n0)));
    to[n1] = factor * (y1 + own.second.times(adapted, row, part_of(n1)));
  }
};

// Of attention's output, and of the inner layer: they are added to what is hidden.
struct FinishHidden {
  static constexpr int PARTS = 1;
  int layer, place;
  const bf16* norm;  // of the next phase

  struct Ahead {
    Expansion first, second;
    float x0, x1;
    bf16 norm0, norm1;
  };

  template <class A> __device__ Ahead ahead(const A& adapted, int row, int n0, int n1) const {
    const float* x = hidden() + (size_t)min(row, rows() - 1) * HIDDEN;
    return {{adapted, 0, n0}, {adapted, 0, n1}, x[n0], x[n1], norm[n0], norm[n1]};
  }

  template <class A>
  __device__ void operator()(const A& adapted, int row, int n0, int n1, float y0, float y1,
                             const Ahead& own) const {
    y0 += own.first.times(adapted, row, 0), y1 += own.second.times(adapted, row, 0);
    set_hidden(row, n0, n1, own.x0 + y0, own.x1 + y1, own.norm0, own.norm1);
  }
};

struct FinishGateUp {
  static constexpr int PARTS = 2, place = LORA_GATE_UP;
  int layer;

  struct Ahead {
    Expansion gate, up;
  };

  template <class A> __device__ Ahead ahead(const A& adapted, int, int n, int) const {
    // A unit's second outputs are of up, with the same number.
    return {{adapted, 0, n}, {adapted, 1, n}};
  }

  template <class A>
  __device__ void operator()(const A& adapted, int row, int n, int, float gate, float up,
                             const Ahead& own) const {
    if (row >= rows()) return;
    const float factor = factors()[row];
    gate = factor * (gate + own.gate.times(adapted, row, 0));
    up = factor * (up + own.up.times(adapted, row, 1));
    active()[placed(row, n, INNER)] = narrow(gate / (1.f + __expf(-gate)) * up);
  }
};

struct FinishHead {
  static constexpr int PARTS = 0, layer = 0, place = 0;

  struct Ahead {};
  template <class A> __device__ Ahead ahead(const A&, int, int, int) const { return {}; }

  template <class A>
  __device__ void operator()(const A&, int row, int n0, int n1, float y0, float y1, Ahead) const {
    if (row >= rows()) return;
    float* to = state().logits + (size_t)row * VOCAB;
    if (n0 < VOCAB) to[n0] = factors()[row] * y0;
    if (n1 < VOCAB) to[n1] = factors()[row] * y1;
  }
};
