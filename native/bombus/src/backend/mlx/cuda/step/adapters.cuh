// What adapters add to a product: y += scale * (x a^T) b^T.
//
// x a^T is added up where x is made: whoever has made an input of the next product adds its share, for the adapter of
// its row, to numbers of 64 bits that all blocks share. So it is there when x is, behind the same barrier; and integers
// have the same sum in any order.

constexpr float FIXED = 268435456.f;  // 1 in those numbers, which go up to 2^35

// Where a product's pairs are: q, k and v's, o's, gate's and up's, down's.
struct Place {
  int layer, first, parts;
};

__device__ inline Place place_of(int product) {
  if (product < 0 || product >= PRODUCTS * LAYERS) return {0, 0, 0};
  const int kind = product % PRODUCTS;
  return {product / PRODUCTS, kind == 0 ? LORA_QKV : kind == 1 ? LORA_O : kind == 2 ? LORA_GATE_UP : LORA_DOWN,
          kind == 0 ? 3 : kind == 2 ? 2 : 1};
}

// Inputs and outputs of the layers that pairs are for.
__device__ inline int inputs_of(int place) {
  return place == LORA_O ? Q_WIDTH : place == LORA_DOWN ? INNER : HIDDEN;
}
__device__ inline int outputs_of(int place) {
  if (place == LORA_QKV) return Q_WIDTH;
  return place < LORA_O ? KV_WIDTH : place == LORA_O || place == LORA_DOWN ? HIDDEN : INNER;
}

// A product and the one behind it, whose inputs it makes (attention makes o's of q, k and v). Before the first is
// number -1.
struct Product {
  int number;
  Place own, next;

  __device__ explicit Product(int number) : number(number), own(place_of(number)), next(place_of(number + 1)) {}
};

__device__ inline bool adapted() { return state().most_rank > 0; }

// x a^T of a product: [3, MOST_RANK] for a row, in several parts that are added up where they are used: additions to one
// place wait for each other (5 ns each), and many blocks come at once. Three products take turns: while one is computed,
// its numbers are used, the next one's added up, and those of the one before set to zero.
__device__ inline int shards() { return rows() == 1 ? 8 : 2; }
__device__ inline word* low_rank(int product, int shard, int row) {
  return in_workspace<word>(LOW_RANK) + ((size_t)(product % 3) * 2 * MOST_ROWS + shard * rows() + row) * 3 * MOST_RANK;
}
// Where this block adds.
__device__ inline word* own_low_rank(int product, int row) { return low_rank(product, blockIdx.x % shards(), row); }

// Before a product is finished, by `count` threads of every block, of which this is one.
__device__ inline void clear_low_rank(int product, int thread, int count) {
  const int rank = state().most_rank, words = shards() * rows() * 3 * rank;
#pragma unroll 1
  for (int i = blockIdx.x * count + thread; i < words; i += gridDim.x * count)
    low_rank(product + 2, 0, 0)[i / rank * MOST_RANK + i % rank] = 0;
}

__device__ inline Pair read_pair(int row, int layer, int place) {
  const word* own = reinterpret_cast<const word*>(planned(row)[1]);
  if (!own) return {};
  own += (layer * LORA_PAIRS + place) * 3;
  return {reinterpret_cast<const bf16*>(own[0]), reinterpret_cast<const bf16*>(own[1]), (int)(unsigned)own[2],
          __uint_as_float((unsigned)(own[2] >> 32))};
}

// With one tile, a warp reads all pairs of a layer while the layer before is computed.
__device__ inline Pair& kept_pair(int row, int layer, int place) {
  return in_shared<Pair>(PAIRS)[(layer % 2 * ROWS + row) * LORA_PAIRS + place];
}

__device__ inline void keep_pairs(int layer) {
#pragma unroll 1
  for (int i = lane(); i < rows() * LORA_PAIRS; i += 32)
    kept_pair(i / LORA_PAIRS, layer, i % LORA_PAIRS) = read_pair(i / LORA_PAIRS, layer, i % LORA_PAIRS);
}

// One matrix of a pair; with more tiles it is kept as a word, whose lowest bits are the rank / 8.
struct Side {
  const bf16* numbers;
  int rank;

  __device__ static word packed(const bf16* numbers, int rank) { return reinterpret_cast<word>(numbers) | rank / 8; }
  __device__ static Side of(word packed) {
    return {reinterpret_cast<const bf16*>(packed & ~(word)15), (int)(packed & 15) * 8};
  }
};

// With more tiles, what a product and those that make the next one's inputs need is read by all threads before its
// barrier: [parts, MOST_ROWS], b's, then the next one's a's.
__device__ inline word* kept_sides(int part) { return in_shared<word>(PAIRS) + part * MOST_ROWS; }
__device__ inline float* kept_scales(int part) { return in_shared<float>(SCALES) + part * MOST_ROWS; }

__device__ inline void keep_sides(const Product& at) {
  const Place own = at.own, next = at.next;
#pragma unroll 1
  for (int i = threadIdx.x; i < rows() * (own.parts + next.parts); i += THREADS) {
    const int row = i % rows(), part = i / rows();
    const bool expands = part < own.parts;
    const Place& place = expands ? own : next;
    const Pair pair = read_pair(row, place.layer, place.first + part - (expands ? 0 : own.parts));
    kept_sides(part)[row] = Side::packed(expands ? pair.b : pair.a, pair.rank);
    if (expands) kept_scales(part)[row] = pair.scale;
  }
}

// b of a product's part for a row, and what its numbers of x a^T must be multiplied with.
__device__ inline Side expander(const Place& own, int row, int part) {
  if (row >= rows()) return {};
  if (TILES > 1) return Side::of(kept_sides(part)[row]);
  const Pair& pair = kept_pair(row, own.layer, own.first + part);
  return {pair.b, pair.rank};
}
__device__ inline float scale_of(const Place& own, int row, int part) {
  if (row >= rows()) return 0.f;
  return TILES > 1 ? kept_scales(part)[row] : kept_pair(row, own.layer, own.first + part).scale;
}
// a of a part of the next product.
__device__ inline Side shrinker(const Product& at, int row, int part) {
  if (row >= rows() || part >= at.next.parts) return {};
  if (TILES > 1) return Side::of(kept_sides(at.own.parts + part)[row]);
  const Pair& pair = kept_pair(row, at.next.layer, at.next.first + part);
  return {pair.a, pair.rank};
}

// Brings a block's share of a side of the pairs of a product into the card's cache: the weights that come all the time
// would else make them wait. With one tile, by a warp.
__device__ inline void bring_sides(Place place, bool b) {
  const int first = blockIdx.x + gridDim.x * lane(), step = gridDim.x * 32;
#pragma unroll 1
  for (int i = 0; i < rows() * place.parts; i++) {
    const int at = place.first + i % place.parts;
    const Pair pair = kept_pair(i / place.parts, place.layer, at);
    const bf16* from = b ? pair.b : pair.a;
#pragma unroll 1
    for (int line = first; line < (b ? outputs_of(at) : inputs_of(at)) * pair.rank / 64; line += step)
      prefetch(from + (size_t)line * 64);
  }
}

// What a product's pairs need besides, with one tile: those that come next are brought, b's of the next product and a's of
// the one behind that (the next layer's pairs are kept while attention is made).
__device__ __noinline__ static void ready_adapters(int product) {
  clear_low_rank(product, lane(), 32);
  bring_sides(place_of(product + 1), true);
  bring_sides(place_of(product + 2), false);
}

// A warp that makes a product's outputs has 16 of them (of gate and up eight) for four rows: `first`, and every other
// behind it. OWN: so many rows may be there, one or four; without adapters, none. What adapters are multiplied with goes
// through the tensor cores, for each row with its own. A single warp waits for most of its instructions to be
// fetched: so there is code for one row.
constexpr int OWN_ROWS = 4;

// What a lane feeds to the tensor cores of eight numbers of the rank, for the 16 inputs from n / 16 * 16 on.
__device__ inline uint2 fragment(const Side& a, int n, int rank) {
  if (rank >= a.rank) return make_uint2(0, 0);
  return reinterpret_cast<const uint2*>(a.numbers)[((size_t)(n / 16) * (a.rank / 8) + rank / 8) * 32 + lane()];
}

// Lanes of row i of a tile have two numbers of row i % OWN's x a^T: `to`, that row's eight, gets one of each lane.
template <int OWN> __device__ inline void add_fixed(word* to, const float (&sums)[2]) {
  const int which = tile_row() / OWN;
  const long long fixed = __float2ll_rn((which ? sums[1] : sums[0]) * FIXED);
  if (which < 2 && fixed != 0) add_relaxed(to + 2 * tile_column() + which, (word)fixed);
}

// What a warp's outputs, which are inputs of the next product, add to its x a^T.
template <int OWN, int PARTS> struct Shares {
  uint2 a[PARTS][OWN];  // for the first eight of the rank

  // Asks for them, for the outputs from n on.
  __device__ void ask(const Product& at, int first, int n) {
#pragma unroll
    for (int i = 0; i < OWN; i++)
      if (OWN == 1 || first + 2 * i < rows())
#pragma unroll
        for (int part = 0; part < PARTS; part++) a[part][i] = fragment(shrinker(at, first + 2 * i, part), n, 0);
  }

  // x: outputs tile_row() and tile_row() + 8 of row first + 2 * tile_column(), or of eight the first alone.
  __device__ void add(const Product& at, int first, int n, unsigned x, bool eight = false) const {
    const int from = tile_column() * 8 + tile_row() % OWN;
    const unsigned one = __shfl_sync(0xffffffff, x, from), other = __shfl_sync(0xffffffff, x, from + 4);
    unsigned x0 = __byte_perm(one, other, 0x5410), x1 = __byte_perm(one, other, 0x7632);
    if (eight) {
      const bool upper = n % 16 != 0;
      x1 = upper ? x0 : 0, x0 = upper ? 0 : x0;
    }
    word* to = own_low_rank(at.number + 1, first + 2 * (tile_row() % OWN));
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      if (part >= at.next.parts) break;
      float own[2] = {};
#pragma unroll
      for (int i = 0; i < OWN; i++)
        if (OWN == 1 || first + 2 * i < rows()) add_row(own, i, x0, x1, a[part][i]);
      add_fixed<OWN>(to + part * MOST_RANK, own);
    }
    if (state().most_rank > 8) add_more(at.number, first, n, x0, x1);
  }

  // Row i's sums go to the lanes of that row of the tile.
  __device__ static void add_row(float (&own)[2], int i, unsigned x0, unsigned x1, uint2 a) {
    float sums[2] = {};
    multiply_upper(sums, x0, x1, a.x, a.y);
    if (tile_row() % OWN == i) own[0] = sums[0], own[1] = sums[1];
  }

  // What comes behind the first eight of a rank.
  __device__ __noinline__ static void add_more(int product, int first, int n, unsigned x0, unsigned x1) {
    const Product at(product);
    word* to = own_low_rank(product + 1, first + 2 * (tile_row() % OWN));
#pragma unroll 1
    for (int part = 0; part < at.next.parts; part++)
#pragma unroll 1
      for (int rank = 8; rank < state().most_rank; rank += 8) {
        float own[2] = {};
#pragma unroll 1
        for (int i = 0; i < OWN && first + 2 * i < rows(); i++)
          add_row(own, i, x0, x1, fragment(shrinker(at, first + 2 * i, part), n, rank));
        add_fixed<OWN>(to + part * MOST_RANK + rank, own);
      }
  }
};

template <int PARTS> struct Shares<0, PARTS> {
  __device__ void ask(const Product&, int, int) {}
  __device__ void add(const Product&, int, int, unsigned, bool = false) const {}
};

// What adapters add to a warp's outputs, of which a lane has two of a row: of one part, or of two parts, the first and
// the one behind it.
template <int OWN, int PARTS> struct Expansion {
  unsigned b[OWN][2];  // for the first eight of the rank
  unsigned x[PARTS];   // of row tile_row() of the tile

  // Two numbers of the rank for an output.
  __device__ static unsigned side(const Product& at, int row, int part, int n, int rank) {
    const Side b = expander(at.own, row, part);
    if (rank >= b.rank) return 0;
    return *reinterpret_cast<const unsigned*>(b.numbers + (size_t)n * b.rank + rank + 2 * tile_column());
  }

  __device__ static float2 numbers_at(const Product& at, int shard, int row, int part, int rank) {
    const word* from = low_rank(at.number, shard, row) + part * MOST_RANK + rank + 2 * tile_column();
    const ulonglong2 two = *reinterpret_cast<const ulonglong2*>(from);
    return make_float2((float)(long long)two.x, (float)(long long)two.y);
  }

  // Two of the row of the tile: of a single row, each row of lanes has a shard.
  __device__ static unsigned number(const Product& at, int first, int part, int rank) {
    const int row = OWN == 1 ? 0 : first / 8 * 8 + tile_row();
    if (row >= rows()) return 0;
    float2 own = numbers_at(at, OWN == 1 ? tile_row() : 0, row, part, rank);
    if (OWN == 1) {
#pragma unroll
      for (int other = 4; other < 32; other *= 2) {
        own.x += __shfl_xor_sync(0xffffffff, own.x, other);
        own.y += __shfl_xor_sync(0xffffffff, own.y, other);
      }
    } else {
      const float2 more = numbers_at(at, 1, row, part, rank);
      own.x += more.x, own.y += more.y;
    }
    const float scale = scale_of(at.own, row, part) / FIXED;
    return pack_bf16(own.x * scale, own.y * scale);
  }

  // Asks for b, which is there before x is.
  __device__ void ask(const Product& at, int first, int part, const int (&n)[2]) {
#pragma unroll
    for (int i = 0; i < OWN; i++)
      if (OWN == 1 || first + 2 * i < rows())
#pragma unroll
        for (int j = 0; j < 2; j++) b[i][j] = side(at, first + 2 * i, part + j * (PARTS - 1), n[j], 0);
  }

  // Behind the barrier that x comes with.
  __device__ void receive(const Product& at, int first, int part) {
#pragma unroll
    for (int i = 0; i < PARTS; i++) x[i] = number(at, first, part + i, 0);
  }

  // For row first + 2 * tile_column().
  __device__ float2 added(const Product& at, int first, int part, const int (&n)[2]) const {
    float all[4] = {};  // of all rows of the tile
#pragma unroll
    for (int i = 0; i < OWN; i++)
      if (OWN == 1 || first + 2 * i < rows()) add_row(all, first % 8 + 2 * i, b[i], x);
    float2 own = of_row(all, first);
    if (state().most_rank > 8) {
      const float2 rest = more(at.number, first, part, n[0], n[1]);
      own.x += rest.x, own.y += rest.y;
    }
    return own;
  }

  __device__ static float2 of_row(const float (&all)[4], int first) {
    return first % 2 ? make_float2(all[1], all[3]) : make_float2(all[0], all[2]);
  }

  __device__ static void add_row(float (&all)[4], int row, const unsigned (&b)[2], const unsigned (&x)[PARTS]) {
    const bool own = tile_row() == row;
    if (PARTS == 1) multiply(all, b[0], b[1], 0, 0, own ? x[0] : 0, 0);
    else multiply(all, b[0], 0, 0, b[1], own ? x[0] : 0, own ? x[PARTS - 1] : 0);
  }

  // What comes behind the first eight of a rank.
  __device__ __noinline__ static float2 more(int product, int first, int part, int n0, int n1) {
    const Product at(product);
    float all[4] = {};
#pragma unroll 1
    for (int rank = 8; rank < state().most_rank; rank += 8) {
      unsigned x[PARTS];
#pragma unroll
      for (int i = 0; i < PARTS; i++) x[i] = number(at, first, part + i, rank);
#pragma unroll 1
      for (int i = 0; i < OWN && first + 2 * i < rows(); i++) {
        const int row = first + 2 * i;
        const unsigned b[2] = {side(at, row, part, n0, rank), side(at, row, part + PARTS - 1, n1, rank)};
        add_row(all, row % 8, b, x);
      }
    }
    return of_row(all, first);
  }
};

template <int PARTS> struct Expansion<0, PARTS> {
  __device__ void ask(const Product&, int, int, const int (&)[2]) {}
  __device__ void receive(const Product&, int, int) {}
  __device__ float2 added(const Product&, int, int, const int (&)[2]) const { return make_float2(0.f, 0.f); }
};
