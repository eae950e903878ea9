// Attention of many rows of one sequence, causal, on tensor cores: the softmax is made on the way (Dao,
// "FlashAttention-2", 2023). MLX would take cuDNN's, which is compiled anew for every length.
//
// q: [1, HEADS, rows, DIM], k, v: [1, KV_HEADS, positions, DIM], of which the last are the rows' own. Where there is a
// WINDOW, a row sees so many positions, its own among them.
// -> y: [rows, HEADS * DIM]. A block has 64 rows of a head, each of its four warps 16; keys and values come
// in tiles of 64, one of them on its way while another is used.
constexpr int TILE = 64, STRIDE = DIM * 2 + 16, TILE_BYTES = TILE * STRIDE;
const int rows = q_shape[2], positions = k_shape[2], start = positions - rows;
const int tiles = (rows + TILE - 1) / TILE;
// The last rows have the most to do.
const int head = blockIdx.x % HEADS, first = (tiles - 1 - blockIdx.x / HEADS) * TILE;
const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
const bf16* queries = reinterpret_cast<const bf16*>(q) + ((size_t)head * rows + first) * DIM;
const int kv_head = head / (HEADS / KV_HEADS);
const bf16* keys = reinterpret_cast<const bf16*>(k) + (size_t)kv_head * positions * DIM;
const bf16* values = reinterpret_cast<const bf16*>(v) + (size_t)kv_head * positions * DIM;
unsigned char* shared = dynamic_shared();

// Rows of a tile; what is not there is the last that is.
auto copy_tile = [&](unsigned char* to, const bf16* from, int at, int all) {
  for (int i = threadIdx.x; i < TILE * DIM / 8; i += 128) {
    const int row = i / (DIM / 8), column = i % (DIM / 8);
    copy_async(to + row * STRIDE + column * 16, from + (size_t)min(at + row, all - 1) * DIM + column * 8);
  }
};
copy_tile(shared, queries, 0, rows - first);
commit_copies();
wait_copies<0>();
__syncthreads();
unsigned q_fragments[DIM / 16][4];
#pragma unroll
for (int i = 0; i < DIM / 16; i++)
  load_matrices(q_fragments[i], shared + (warp * 16 + lane % 16) * STRIDE + i * 32 + lane / 16 * 16);
__syncthreads();

const int seen = min(start + first + TILE, positions);  // by the last of these rows
const int key_tiles = (seen + TILE - 1) / TILE;
const int first_tile = WINDOW && start + first + 1 > WINDOW ? (start + first + 1 - WINDOW) / TILE : 0;
float sums[DIM / 8][4] = {}, largest[2] = {LEAST, LEAST}, total[2] = {};
copy_tile(shared + first_tile % 2 * 2 * TILE_BYTES, keys, first_tile * TILE, positions);
copy_tile(shared + (first_tile % 2 * 2 + 1) * TILE_BYTES, values, first_tile * TILE, positions);
commit_copies();
for (int tile = first_tile; tile < key_tiles; tile++) {
  unsigned char* own = shared + tile % 2 * 2 * TILE_BYTES;
  if (tile + 1 < key_tiles) {
    unsigned char* next = shared + (tile + 1) % 2 * 2 * TILE_BYTES;
    copy_tile(next, keys, (tile + 1) * TILE, positions);
    copy_tile(next + TILE_BYTES, values, (tile + 1) * TILE, positions);
  }
  commit_copies();
  wait_copies<1>();
  __syncthreads();
  float scores[TILE / 8][4] = {};
#pragma unroll
  for (int i = 0; i < DIM / 16; i++)
#pragma unroll
    for (int j = 0; j < TILE / 8; j += 2) {
      // Keys j * 8 .. + 16, numbers i * 16 .. + 16.
      unsigned b[4];
      load_matrices(b, own + (j * 8 + lane / 16 * 8 + lane % 8) * STRIDE + i * 32 + lane / 8 % 2 * 16);
      multiply(scores[j], q_fragments[i][0], q_fragments[i][1], q_fragments[i][2], q_fragments[i][3], b[0], b[1]);
      multiply(scores[j + 1], q_fragments[i][0], q_fragments[i][1], q_fragments[i][2], q_fragments[i][3], b[2], b[3]);
    }
  const float scale = score_factor(DIM, SCORE_FACTOR_BITS);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int at = start + first + warp * 16 + r * 8 + g;
    float most = largest[r];
#pragma unroll
    for (int j = 0; j < TILE / 8; j++)
#pragma unroll
      for (int c = 0; c < 2; c++) {
        float& score = scores[j][r * 2 + c];
        const int key = tile * TILE + j * 8 + 2 * t + c;
        // A row that sees nothing of its first tiles forgets them at the first key that it sees.
        score = key <= at && !(WINDOW && key + WINDOW <= at) ? score * scale : LEAST;
        most = fmaxf(most, score);
      }
    most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 1));
    most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 2));
    const float fade = exp2f(largest[r] - most);
    largest[r] = most;
    total[r] *= fade;
#pragma unroll
    for (int j = 0; j < TILE / 8; j++)
#pragma unroll
      for (int c = 0; c < 2; c++) {
        float& score = scores[j][r * 2 + c];
        score = exp2f(score - most);
        total[r] += score;
      }
#pragma unroll
    for (int j = 0; j < DIM / 8; j++) sums[j][r * 2] *= fade, sums[j][r * 2 + 1] *= fade;
  }
#pragma unroll
  for (int i = 0; i < TILE / 16; i++) {
    const unsigned a0 = pack_bf16(scores[2 * i][0], scores[2 * i][1]);
    const unsigned a1 = pack_bf16(scores[2 * i][2], scores[2 * i][3]);
    const unsigned a2 = pack_bf16(scores[2 * i + 1][0], scores[2 * i + 1][1]);
    const unsigned a3 = pack_bf16(scores[2 * i + 1][2], scores[2 * i + 1][3]);
#pragma unroll
    for (int j = 0; j < DIM / 8; j += 2) {
      // Values i * 16 .. + 16, numbers j * 8 .. + 16.
      unsigned b[4];
      load_matrices_transposed(b, own + TILE_BYTES + (i * 16 + lane % 16) * STRIDE + (j + lane / 16) * 16);
      multiply(sums[j], a0, a1, a2, a3, b[0], b[1]);
      multiply(sums[j + 1], a0, a1, a2, a3, b[2], b[3]);
    }
  }
  __syncthreads();
}
#pragma unroll
for (int r = 0; r < 2; r++) {
  float all = total[r];
  all += __shfl_xor_sync(0xffffffff, all, 1);
  all += __shfl_xor_sync(0xffffffff, all, 2);
  const int row = first + warp * 16 + r * 8 + g;
  if (row >= rows) continue;
  unsigned* out = reinterpret_cast<unsigned*>(y) + ((size_t)row * HEADS + head) * (DIM / 2) + t;
#pragma unroll
  for (int j = 0; j < DIM / 8; j++) out[j * 4] = pack_bf16(sums[j][r * 2] / all, sums[j][r * 2 + 1] / all);
}
