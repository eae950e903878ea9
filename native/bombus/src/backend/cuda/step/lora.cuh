// LoRA adds scale * (x a^T) b^T to a product; here is where A, B and x a^T lie.
//
// x a^T is added up where x is made (shrink): whoever makes inputs of the next product adds their x a^T, for the
// adapter of the row, to numbers of 64 bits that all blocks share. So it is there when x is, behind the same barrier,
// and no phase of its own is needed. The numbers are integers (FIXED is 1), which have the same sum in any order of
// blocks.
//
// With one tile a warp reads the LoRA of a layer while the layer before is computed (`keep_loras`). With more tiles
// there are too many rows for that: all threads read what a product needs before its barrier (`keep_matrices`).

constexpr float FIXED = 268435456.f;  // 1 in those numbers, which go up to 2^35

// Where a product's LoRA is: q, k and v's, o's, gate's and up's, down's.
struct Place {
  int layer, first, count;  // fused linear layers
};

__device__ inline Place place_of(int product) {
  if (product < 0 || product >= PRODUCTS * LAYERS) return {0, 0, 0};
  const int kind = product % PRODUCTS;
  return {product / PRODUCTS, kind == 0 ? LORA_QKV : kind == 1 ? LORA_O : kind == 2 ? LORA_GATE_UP : LORA_DOWN,
          kind == 0 ? 3 : kind == 2 ? 2 : 1};
}

// A product and the one behind it, whose inputs it makes (attention makes o's of q, k and v). Before the first is
// number -1.
struct Product {
  int number;
  Place own, next;

  __device__ explicit Product(int number) : number(number), own(place_of(number)), next(place_of(number + 1)) {}
};

__device__ inline bool adapted() { return state().most_rank > 0; }

// x a^T of a product: [3, MOST_RANK] for a row, in shards that are added up where they are used: additions to one place
// wait for each other (bench/README.md), and many blocks come at once. Products rotate through buffers: while one is computed, its
// numbers are used, the next one's added up, and those of the one behind that set to zero; with several tiles by blocks
// that are ahead, while others use those of the product before: hence four.
__device__ inline int shards() { return rows() == 1 ? SHARDS_OF_ONE_ROW : SHARDS; }
__device__ inline word* low_rank(int product, int shard, int row) {
  const unsigned index = (unsigned)product % LOW_RANK_BUFFERS * SHARDS * MOST_ROWS + shard * rows() + row;
  return in_workspace<word>(LOW_RANK) + index * 3 * MOST_RANK;
}
// Where this block adds.
__device__ inline word* own_low_rank(int product, int row) { return low_rank(product, blockIdx.x % shards(), row); }

// While a product is made or before, by `count` threads of every block, of which this is one.
__device__ inline void clear_low_rank(int product, int thread, int count) {
  const int rank = state().most_rank, words = shards() * rows() * 3 * rank;
#pragma unroll 1
  for (int i = blockIdx.x * count + thread; i < words; i += gridDim.x * count)
    low_rank(product + 2, 0, 0)[i / rank * MOST_RANK + i % rank] = 0;
}

__device__ inline LoraLayer read_lora(int row, int layer, int place) {
  const word* own = reinterpret_cast<const word*>(planned(row)[1]);
  if (!own) return {};
  own += (layer * LORA_LAYERS + place) * LORA_WORDS;
  return {reinterpret_cast<const bf16*>(own[0]), reinterpret_cast<const bf16*>(own[1]), (int)(unsigned)own[2],
          __uint_as_float((unsigned)(own[2] >> 32))};
}

// With one tile, a warp reads all LoRA of a layer while the layer before is computed.
__device__ inline LoraLayer& kept_lora(int row, int layer, int place) {
  return in_shared<LoraLayer>(LORAS)[(layer % 2 * ROWS + row) * LORA_LAYERS + place];
}

__device__ inline void keep_loras(int layer) {
#pragma unroll 1
  for (int i = lane(); i < rows() * LORA_LAYERS; i += 32)
    kept_lora(i / LORA_LAYERS, layer, i % LORA_LAYERS) = read_lora(i / LORA_LAYERS, layer, i % LORA_LAYERS);
}

// One matrix of a lora; with more tiles it is kept as a word, whose lowest bits are the rank / 8.
struct LoraMatrix {
  const bf16* numbers;
  int rank;

  __device__ static word packed(const bf16* numbers, int rank) { return reinterpret_cast<word>(numbers) | rank / 8; }
  __device__ static LoraMatrix of(word packed) {
    return {reinterpret_cast<const bf16*>(packed & ~(word)15), (int)(packed & 15) * 8};
  }
};

// With more tiles, what a product and those that make the next one's inputs need is read by all threads before its
// barrier: [fused, MOST_ROWS], b's, then the next one's a's.
__device__ inline word* kept_matrices(int index) { return in_shared<word>(LORAS) + index * MOST_ROWS; }
__device__ inline float* kept_scales(int index) { return in_shared<float>(SCALES) + index * MOST_ROWS; }

__device__ inline void keep_matrices(const Product& at) {
  const Place own = at.own, next = at.next;
#pragma unroll 1
  for (int i = threadIdx.x; i < rows() * (own.count + next.count); i += THREADS) {
    const int row = i % rows(), index = i / rows();
    const bool expands = index < own.count;
    const Place& place = expands ? own : next;
    const LoraLayer lora = read_lora(row, place.layer, place.first + index - (expands ? 0 : own.count));
    kept_matrices(index)[row] = LoraMatrix::packed(expands ? lora.b : lora.a, lora.rank);
    if (expands) kept_scales(index)[row] = lora.scale;
  }
}

// b of a product's layer for a row, and what its numbers of x a^T must be multiplied with.
__device__ inline LoraMatrix lora_b(const Place& own, int row, int index) {
  if (row >= rows()) return {};
  if (TILES > 1) return LoraMatrix::of(kept_matrices(index)[row]);
  const LoraLayer& lora = kept_lora(row, own.layer, own.first + index);
  return {lora.b, lora.rank};
}
__device__ inline float scale_of(const Place& own, int row, int index) {
  if (row >= rows()) return 0.f;
  return TILES > 1 ? kept_scales(index)[row] : kept_lora(row, own.layer, own.first + index).scale;
}
// a of a layer of the next product.
__device__ inline LoraMatrix lora_a(const Product& at, int row, int index) {
  if (row >= rows() || index >= at.next.count) return {};
  if (TILES > 1) return LoraMatrix::of(kept_matrices(at.own.count + index)[row]);
  const LoraLayer& lora = kept_lora(row, at.next.layer, at.next.first + index);
  return {lora.a, lora.rank};
}

// With more tiles, what a product's x a^T is, of a batch of rows and for the first eight of the rank, is read by all
// threads once for all outputs; if there are several batches, once for those of a unit.
struct alignas(16) Eight {
  float numbers[8];

  __device__ void to(float (&x)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = numbers[i];
  }
};
__device__ inline Eight& kept_low_rank(int index, int row) {
  return in_shared<Eight>(LOW_RANK_OF_ROWS)[index * ROWS + row % ROWS];
}

__device__ inline void keep_low_rank(const Product& at, int batch) {
#pragma unroll 1
  for (int i = threadIdx.x; i < at.own.count * ROWS * 8; i += THREADS) {
    const int index = i / (ROWS * 8), row = batch * ROWS + i / 8 % ROWS, from = index * MOST_RANK + i % 8;
    word sum = 0;
    if (row < rows())
      for (int shard = 0; shard < SHARDS; shard++) sum += low_rank(at.number, shard, row)[from];
    kept_low_rank(index, row).numbers[i % 8] = (float)(long long)sum * (scale_of(at.own, row, index) / FIXED);
  }
}
