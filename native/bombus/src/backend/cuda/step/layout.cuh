// The layout derives from the shared constants where everything lies: tiles, stages, and shared memory.
//
// Before this comes what `layout.rs` prints: the model's numbers (HIDDEN, ..., SCALED), the constants that Rust knows
// too, the words of the model's table, and where the areas of the workspace begin. TILES comes first: rows are
// multiplied by 8 * TILES at once, and two kernels are compiled, for one tile and for MOST_TILES.
//
//   shared memory, one tile:    FACTORS .. STATE | WORDS | LORAS          | STAGES of weights      | sums of the warps
//   with more tiles:            FACTORS .. STATE | WORDS | LORAS, SCALES, | STAGES | INPUT_STAGES  | sums of the warps
//                                                        | LOW_RANK_OF_ROWS
//   during attention:           ...                                       | STAGES | a Team for each four warps
//
// Stages stay where they are in all phases, since producers fill them while the blocks wait. Strides are chosen so
// that the lanes that read together fall into different banks.
//
// A plan is HEADER words: rows (and in the highest 16 bits the plan's number), words of a row, the highest rank of an
// adapter, where the workspace has room for a copy; and for every row: id and position, adapter, pages. An id is a
// token's, or -1 - the row of `sampled` that has it. Or it is one word with GOES_ON: rows, from bit 32 on how many
// steps ago the last whole plan was, and its number. Every row is so much further on, and takes its own row's sample.

constexpr int THREADS = WARPS * 32;  // that multiply
constexpr int EPILOGUE_WARPS = TILES == 1 ? EPILOGUE_WARPS_OF_ONE_TILE : 0, COMPUTING = WARPS + EPILOGUE_WARPS;
constexpr int ALL_THREADS = (COMPUTING + (TILES == 1 ? PRODUCERS_OF_ONE_TILE : PRODUCERS_OF_TILES)) * 32;
constexpr int TEAM = 128, TEAMS = THREADS / TEAM;
constexpr int GROUP = 64;  // of quantization
static_assert(PAGE == PAGE_POSITIONS, "pages");

constexpr int Q_WIDTH = HEADS * DIM, KV_WIDTH = KV_HEADS * DIM, QKV_WIDTH = Q_WIDTH + 2 * KV_WIDTH;
constexpr int GQA_GROUP = HEADS / KV_HEADS;  // query heads of a head of keys and values
constexpr int ROWS = TILES * TILE_ROWS;  // at once
constexpr int INPUT_GROUPS = 8;           // come at once, at most
// Groups of a stage: attention of wider heads needs more memory beside the stages.
constexpr int MOST_OF_ONE_TILE = DIM > 128 ? 64 : 80;

// A weight of 4 bits in groups of 64: codes [N, K / 8]; scales_biases: for every 16 outputs (as `TileShape::output`
// takes them), every 4 groups, every of those outputs and groups: scale and bias.
struct Matrix {
  const unsigned* codes;
  const unsigned* scales_biases;
};

constexpr int HEAD_WORDS = EMBEDDING;  // that are kept: the head and its norm
constexpr int PRODUCTS = 4;  // of a layer

// A page has PAGE positions of all layers, keys and values, heads: keys [PAGE, DIM], values [DIM, PAGE].
__device__ inline bf16* in_page(word page, int layer, int kind, int head) {
  return reinterpret_cast<bf16*>(page) + (size_t)((layer * 2 + kind) * KV_HEADS + head) * PAGE * DIM;
}

// Where x[row][k] lies, so that a thread reads what it feeds to the tensor cores as 16 bytes: tiles of 8
// rows, groups of 64, halves, lanes, and 8 numbers in the order 0 4 1 5 2 6 3 7, which is that of the codes
// that `widened` takes out of a word. The first half of a group's 16 numbers is HALF before the other.
constexpr unsigned HALF = 32 * 8;
__device__ inline unsigned swizzled(unsigned row, unsigned k, unsigned width) {
  const unsigned lane = row % 8 * 4 + k % 64 / 16, i = k % 8;
  const unsigned half = (row / 8 * (width / 64) + k / 64) * 2 + k % 16 / 8;
  return half * HALF + lane * 8 + i % 4 * 2 + i / 4;
}

constexpr int largest_divisor(int n, int most) {
  return most >= n ? n : n % most == 0 ? most : largest_divisor(n, most - 1);
}

// What a product's outputs become: themselves, gate's beside up's for SwiGLU, or added to the residual stream, by whole
// warps, also for rows that are not there.
enum Kind { PLAIN, SWIGLU, RESIDUAL };

// How a weight [N, K] is divided: units of TALL outputs, whose groups of inputs come in chunks, each a stage
// in shared memory.
template <int INPUTS, int OUTPUTS, Kind KIND> struct TileShape {
  static constexpr int K = INPUTS, N = OUTPUTS;
  static constexpr Kind kind = KIND;
  static constexpr bool NORMED = KIND != RESIDUAL;  // but for a factor of each row
  // Tiles of 16 outputs: inputs are read once for all of them, but there must be units for all blocks.
  static constexpr int HIGH = TILES == 1 ? 1 : KIND == RESIDUAL ? 2 : 4;
  static constexpr int TALL = 16 * HIGH, UNITS = (N + TALL - 1) / TALL;
  static constexpr int GROUPS = K / GROUP, MOST = TILES == 1 ? MOST_OF_ONE_TILE : 64 / HIGH;
  static constexpr int AT_ONCE = GROUPS <= MOST ? GROUPS : 4 * largest_divisor(GROUPS / 4, MOST / 4);
  static constexpr int CHUNKS = GROUPS / AT_ONCE;
  static constexpr int INPUTS_AT_ONCE = largest_divisor(AT_ONCE, INPUT_GROUPS);
  static_assert(CHUNKS * AT_ONCE == GROUPS, "chunks");
  static constexpr int QUADS = (GROUPS + 3) / 4, OWN_QUADS = (AT_ONCE + 3) / 4;
  // Bytes of a row of codes, and from one to the next: eight must fall into different banks.
  static constexpr int ROW = AT_ONCE * 32, STRIDE = ROW + (AT_ONCE % 2 ? 0 : 32);
  static constexpr int SCALE_BIAS_BYTES = OWN_QUADS * 256;  // for 16 outputs
  static constexpr int STAGE = TALL * STRIDE + HIGH * SCALE_BIAS_BYTES;

  // Output number `row` of a unit: of gate and up eight each, alternately, else one after another.
  __device__ static int output(int unit, int row) {
    const int tile = unit * HIGH + row / 16;
    if (KIND == SWIGLU) return tile * 8 + row % 8 + (row % 16 < 8 ? 0 : N / 2);
    return tile * 16 + row % 16;
  }
};

// What of it says how a stage lies in shared memory: code that needs no more is made once for all that agree.
template <class D> using Staged = TileShape<D::AT_ONCE * GROUP, D::TALL, D::HIGH == 2 ? RESIDUAL : PLAIN>;
// The same for outputs.
template <class D> using EpilogueShape = TileShape<GROUP, D::N, D::kind>;

using Qkv = TileShape<HIDDEN, QKV_WIDTH, PLAIN>;
using Output = TileShape<Q_WIDTH, HIDDEN, RESIDUAL>;
using GateUp = TileShape<HIDDEN, 2 * INNER, SWIGLU>;
using Down = TileShape<INNER, HIDDEN, RESIDUAL>;
using Head = TileShape<HIDDEN, VOCAB, PLAIN>;

constexpr size_t larger(size_t a, size_t b) { return a > b ? a : b; }
constexpr size_t rounded(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

// A team's memory for attention: queries, key and value of the row itself; scores of a page, and of the next, then the
// output; the weights of splits.
struct alignas(16) Team {
  bf16 q[8][DIM + 8];  // eight rows must fall into different banks
  bf16 fresh[2][DIM];
  union {
    float scores[2][8][PAGE + 4];
    float output[8 * DIM];  // of the query heads one after another
  };
  float weights[8][MOST_SPLITS];
  unsigned last[4];
};

// An adapter's lora for one linear layer: a [in, rank], b [out, rank]. Ranks are multiples of 8.
struct LoraLayer {
  const bf16* a;
  const bf16* b;
  int rank;
  float scale;
};

// Shared memory.
constexpr int STAGES = TILES == 1 ? 4 : 2;  // of weights
constexpr int STAGE_BYTES = rounded(
    larger(larger(larger(Qkv::STAGE, Output::STAGE), larger(GateUp::STAGE, Down::STAGE)), Head::STAGE), 128);
// Of inputs, for many rows: some groups of all tiles.
constexpr int INPUT_STAGES = 3, INPUT_BYTES = TILES == 1 ? 0 : TILES * INPUT_GROUPS * 1024;
// The warps' sums, [tiles, 2, lanes] pairs for the rows of a lane: with one tile, of several units, and so that the first
// of neighbouring warps fall into different banks.
constexpr int SUMS = TILES == 1 ? 4 : 1;
constexpr int OWN_SUMS = TILES == 1 ? 65 : TILES * 64;
constexpr int SUMS_BYTES = SUMS * WARPS * OWN_SUMS * sizeof(float2);
struct Signals {
  Barrier full[STAGES], empty[STAGES], inputs_full[INPUT_STAGES], inputs_empty[INPUT_STAGES], inputs_ready, summed[SUMS], taken[SUMS];
};
constexpr size_t FACTORS = 0;                                   // 1 / root mean square of hidden [MOST_ROWS]
constexpr size_t FIRST_TASKS = FACTORS + 4 * MOST_ROWS;          // of a row's attention [ATTENTION_KINDS][MOST_ROWS + 1]
// Of layers that see everything, and of those with a window, which see fewer pages.
constexpr int ATTENTION_KINDS = WINDOW ? 2 : 1, TASKS_OF_KIND = MOST_ROWS + 4;
constexpr size_t POSITIONS = FIRST_TASKS + 4 * ATTENTION_KINDS * TASKS_OF_KIND;  // [MOST_ROWS]
constexpr size_t SIGNALS = POSITIONS + 4 * MOST_ROWS;
constexpr size_t STATE = rounded(SIGNALS + sizeof(Signals), 16);  // 128 bytes
constexpr size_t WORDS = STATE + 128;  // of the table, for a layer and the next
// With one tile, LoRA of a layer and the next [2][ROWS][LORA_LAYERS], else those matrices that a product and its
// followers need [4][MOST_ROWS], and scales [3][MOST_ROWS].
constexpr size_t LORAS = rounded(WORDS + 2 * 8 * LAYER_WORDS, 16);
constexpr size_t SCALES = LORAS + (TILES == 1 ? 2 * ROWS * LORA_LAYERS * sizeof(LoraLayer) : 4 * 8 * MOST_ROWS);
// With more tiles, x a^T of the rows that are multiplied at once, for the first eight of the rank [3][ROWS][8].
constexpr size_t LOW_RANK_OF_ROWS = rounded(SCALES + (TILES == 1 ? 0 : 3 * 4 * MOST_ROWS), 16);
constexpr size_t FIRST_STAGE = rounded(LOW_RANK_OF_ROWS + (TILES == 1 ? 0 : 3 * ROWS * 8 * 4), 128);
constexpr size_t FIRST_INPUTS = FIRST_STAGE + (size_t)STAGES * STAGE_BYTES;
constexpr size_t ALL_SUMS = FIRST_INPUTS + (size_t)INPUT_STAGES * INPUT_BYTES;
// There are no inputs nor sums while there is attention.
constexpr size_t SHARED_BYTES = larger(ALL_SUMS + SUMS_BYTES, FIRST_INPUTS + TEAMS * sizeof(Team));
static_assert(SHARED_BYTES <= SHARED_LIMIT, "shared memory");
