// The epilogue of a product takes its sums and writes what the next phase reads. A lane has two outputs of a row (of
// gate and up one each).
//
//   QkvEpilogue       factor * (y + LoRA) + bias              -> qkv
//   ResidualEpilogue  hidden + residual_factor * (y + LoRA + bias)
//                                                             -> hidden, squares, normed (times the next norm's weight)
//   BranchEpilogue    y + LoRA + bias                         -> branch and its squares, in place of that
//   SwigluEpilogue    silu(gate) * up of factor * (y + LoRA) + bias
//                                                             -> active
//   LogitsEpilogue    factor * logits_factor * y              -> logits
//
// `factor` is 1 / root mean square of the row: the norm's division comes behind the product, since it needs all of
// hidden. What an epilogue needs besides y are its `Operands`. `prefetch` asks for what is there before the product's
// inputs are, `load` for what comes with them (again for each of the KINDS of outputs), `prepare` makes both ready and
// finds where the outputs go. All of it happens while the product is made: all blocks would wait for what is done
// later. `loaded` says whether what comes with the inputs is new.

// The outputs of a lane, and its row.
struct Outputs {
  int n[2], row;

  __device__ bool there() const { return row < rows(); }
};

__device__ inline float factor_of(const Outputs& out) { return out.there() ? factors()[out.row] : 0.f; }

// Where outputs go that are added to what is hidden: the second of a lane is 8 behind the first.
struct HiddenPlace {
  bool there;
  float *x, *square;
  bf16* next;

  __device__ static HiddenPlace of(const Outputs& out) {
    return {out.there(), hidden() + (size_t)out.row * HIDDEN + out.n[0],
            squares() + (size_t)out.row * (HIDDEN / 16) + (unsigned)out.n[0] / 16,
            normed() + swizzled(out.row, out.n[0], HIDDEN)};
  }
};

// Of 16 outputs of a row, which eight lanes have.
__device__ inline float square_of(float x0, float x1) {
  float square = x0 * x0 + x1 * x1;
  for (int other = 4; other < 32; other *= 2) square += __shfl_xor_sync(0xffffffff, square, other);
  return square;
}

// The input of the next product is normed but for a factor of the row, which needs all of it.
template <class Shrink>
__device__ inline void set_hidden(const Product& at, const Outputs& out, const HiddenPlace& to, float x0, float x1,
                                  bf16 norm0, bf16 norm1, const Shrink& shrink) {
  const unsigned both = pack_bf16(x0 * widen(norm0), x1 * widen(norm1));
  shrink.add(at, out.row, out.n[0], both);
  const float square = square_of(x0, x1);
  if (!to.there) return;
  to.x[0] = x0, to.x[8] = x1;
  to.next[0] = (bf16)both, to.next[HALF] = (bf16)(both >> 16);
  if (tile_row() == 0) *to.square = square;
}

// Which of q, k and v outputs are of, 16 of which are of one; and where that begins.
__device__ inline int fused_index(int n) { return n < Q_WIDTH ? 0 : n < Q_WIDTH + KV_WIDTH ? 1 : 2; }
__device__ inline int fused_start(int index) { return index == 0 ? 0 : index == 1 ? Q_WIDTH : Q_WIDTH + KV_WIDTH; }

template <Specialization OWN> struct QkvEpilogue {
  static constexpr Specialization SPECIAL = OWN;
  static constexpr int KINDS = 3;
  int number;

  struct Operands {
    Expand<SPECIAL, 1> expand;
    float2 added;
    float factor;
    bool there;
    float* to;
    bf16 bias[2 * QKV_BIAS + 1];  // an array of none is no C++

    __device__ void prefetch(const QkvEpilogue& epilogue, const Outputs& out) {
      if (QKV_BIAS) {
        const bf16* from = weight<bf16>(epilogue.number / PRODUCTS, BIAS_OF_QKV);
        for (int i = 0; i < 2; i++) bias[i * QKV_BIAS] = from[out.n[i]];
      }
      const int index = fused_index(out.n[0]), start = fused_start(index);
      expand.prefetch(Product(epilogue.number), out.row, index, {out.n[0] - start, out.n[1] - start});
    }
    __device__ void load(const QkvEpilogue& epilogue, const Outputs& out) {
      expand.load(Product(epilogue.number), out.row, fused_index(out.n[0]));
    }
    __device__ void prepare(const QkvEpilogue& epilogue, const Outputs& out, bool loaded) {
      const int index = fused_index(out.n[0]), start = fused_start(index);
      if (loaded) expand.prepare(Product(epilogue.number), index);
      added = expand.added(Product(epilogue.number), out.row, index, {out.n[0] - start, out.n[1] - start});
      there = out.there(), factor = factor_of(out), to = qkv() + (size_t)out.row * QKV_WIDTH + out.n[0];
    }
  };

  __device__ void operator()(const Outputs&, float2 y, const Operands& own) const {
    if (!own.there) return;
    own.to[0] = own.factor * (y.x + own.added.x), own.to[8] = own.factor * (y.y + own.added.y);
    if (QKV_BIAS) own.to[0] += widen(own.bias[0]), own.to[8] += widen(own.bias[QKV_BIAS]);
  }
};

// That of o or of down: none if it has none.
__device__ inline const bf16* residual_bias(int product) {
  return weight<bf16>(product / PRODUCTS, product % PRODUCTS == 1 ? BIAS_OF_O : BIAS_OF_DOWN);
}

// Of attention's output, and of the inner layer: they are added to what is hidden.
template <Specialization OWN> struct ResidualEpilogue {
  static constexpr Specialization SPECIAL = OWN;
  static constexpr int KINDS = 1;
  int number;
  const bf16* norm;  // of the next phase

  struct Operands {
    Expand<SPECIAL, 1> expand;
    Shrink<SPECIAL, 2, 3> shrink;
    float x0, x1;
    bf16 norm0, norm1;
    bf16 bias[2 * RESIDUAL_BIAS + 1];
    HiddenPlace to;

    __device__ void prefetch(const ResidualEpilogue& epilogue, const Outputs& out) {
      expand.prefetch(Product(epilogue.number), out.row, 0, out.n);
      shrink.prefetch(Product(epilogue.number), out.row, out.n[0]);
      const float* x = hidden() + (size_t)min(out.row, rows() - 1) * HIDDEN;
      x0 = x[out.n[0]], x1 = x[out.n[1]];
      norm0 = epilogue.norm[out.n[0]], norm1 = epilogue.norm[out.n[1]];
      if (!RESIDUAL_BIAS) return;
      const bf16* from = residual_bias(epilogue.number);
      for (int i = 0; i < 2; i++) bias[i * RESIDUAL_BIAS] = from ? from[out.n[i]] : 0;
    }
    __device__ void load(const ResidualEpilogue& epilogue, const Outputs& out) {
      expand.load(Product(epilogue.number), out.row, 0);
    }
    __device__ void prepare(const ResidualEpilogue& epilogue, const Outputs& out, bool loaded) {
      if (loaded) expand.prepare(Product(epilogue.number), 0);
      const float2 added = expand.added(Product(epilogue.number), out.row, 0, out.n);
      x0 += residual_factor() * added.x, x1 += residual_factor() * added.y;
      if (RESIDUAL_BIAS)
        x0 += residual_factor() * widen(bias[0]), x1 += residual_factor() * widen(bias[RESIDUAL_BIAS]);
      shrink.prepare(Product(epilogue.number), out.row);
      to = HiddenPlace::of(out);
    }
  };

  __device__ void operator()(const Outputs& out, float2 y, const Operands& own) const {
    const float x0 = own.x0 + residual_factor() * y.x, x1 = own.x1 + residual_factor() * y.y;
    set_hidden(Product(number), out, own.to, x0, x1, own.norm0, own.norm1, own.shrink);
  }
};

// The same where a norm stands behind them, which needs all of a row (`add_branch` of step.cuh).
template <Specialization OWN> struct BranchEpilogue {
  static constexpr Specialization SPECIAL = OWN;
  static constexpr int KINDS = 1;
  int number;

  struct Operands {
    Expand<SPECIAL, 1> expand;
    bf16 bias[2];
    float2 added;
    bool there;
    float *to, *square;

    __device__ void prefetch(const BranchEpilogue& epilogue, const Outputs& out) {
      expand.prefetch(Product(epilogue.number), out.row, 0, out.n);
      const bf16* from = RESIDUAL_BIAS ? residual_bias(epilogue.number) : nullptr;
      for (int i = 0; i < 2; i++) bias[i] = from ? from[out.n[i]] : 0;
    }
    __device__ void load(const BranchEpilogue& epilogue, const Outputs& out) {
      expand.load(Product(epilogue.number), out.row, 0);
    }
    __device__ void prepare(const BranchEpilogue& epilogue, const Outputs& out, bool loaded) {
      if (loaded) expand.prepare(Product(epilogue.number), 0);
      added = expand.added(Product(epilogue.number), out.row, 0, out.n);
      added.x += widen(bias[0]), added.y += widen(bias[1]);
      there = out.there(), to = branch() + (size_t)out.row * HIDDEN + out.n[0];
      square = branch_squares() + (size_t)out.row * (HIDDEN / 16) + (unsigned)out.n[0] / 16;
    }
  };

  __device__ void operator()(const Outputs&, float2 y, const Operands& own) const {
    const float y0 = y.x + own.added.x, y1 = y.y + own.added.y;
    const float square = square_of(y0, y1);
    if (!own.there) return;
    own.to[0] = y0, own.to[8] = y1;
    if (tile_row() == 0) *own.square = square;
  }
};

// A unit's second outputs are of up, with the same numbers as the gate's.
template <Specialization OWN> struct SwigluEpilogue {
  static constexpr Specialization SPECIAL = OWN;
  static constexpr int KINDS = 1;
  int number;

  struct Operands {
    Expand<SPECIAL, 2> expand;
    Shrink<SPECIAL, 1, 1> shrink;
    float2 added;
    float factor;
    bool there;
    bf16* to;
    bf16 bias[2 * GATE_UP_BIAS + 1];

    __device__ void prefetch(const SwigluEpilogue& epilogue, const Outputs& out) {
      if (GATE_UP_BIAS) {
        const bf16* from = weight<bf16>(epilogue.number / PRODUCTS, BIAS_OF_GATE_UP);
        for (int i = 0; i < 2; i++) bias[i * GATE_UP_BIAS] = from[out.n[0] + i * INNER];
      }
      expand.prefetch(Product(epilogue.number), out.row, 0, {out.n[0], out.n[0]});
      shrink.prefetch(Product(epilogue.number), out.row, out.n[0]);
    }
    __device__ void load(const SwigluEpilogue& epilogue, const Outputs& out) {
      expand.load(Product(epilogue.number), out.row, 0);
    }
    __device__ void prepare(const SwigluEpilogue& epilogue, const Outputs& out, bool loaded) {
      if (loaded) expand.prepare(Product(epilogue.number), 0);
      added = expand.added(Product(epilogue.number), out.row, 0, {out.n[0], out.n[0]});
      shrink.prepare(Product(epilogue.number), out.row);
      there = out.there(), factor = factor_of(out), to = active() + swizzled(out.row, out.n[0], INNER);
    }
  };

  __device__ void operator()(const Outputs& out, float2 y, const Operands& own) const {
    float gate = own.factor * (y.x + own.added.x), up = own.factor * (y.y + own.added.y);
    if (GATE_UP_BIAS) gate += widen(own.bias[0]), up += widen(own.bias[GATE_UP_BIAS]);
    const bf16 x = narrow(gated(gate, up, GELU));
    own.shrink.add(Product(number), out.row, out.n[0], x);
    if (own.there) *own.to = x;
  }
};

struct LogitsEpilogue {
  static constexpr Specialization SPECIAL = NONE;
  static constexpr int KINDS = 1;
  int number;

  struct Operands {
    float factor;
    bool there;
    float* to;

    __device__ void prefetch(const LogitsEpilogue&, const Outputs&) {}
    __device__ void load(const LogitsEpilogue&, const Outputs&) {}
    __device__ void prepare(const LogitsEpilogue&, const Outputs& out, bool) {
      there = out.there(), factor = logits_factor() * factor_of(out), to = state().logits + (size_t)out.row * VOCAB;
    }
  };

  __device__ void operator()(const Outputs& out, float2 y, const Operands& own) const {
    if (!own.there) return;
    if (out.n[0] < VOCAB) own.to[out.n[0]] = own.factor * y.x;
    if (out.n[1] < VOCAB) own.to[out.n[1]] = own.factor * y.y;
  }
};
