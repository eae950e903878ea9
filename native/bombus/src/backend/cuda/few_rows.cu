// y = x w^T for at most 32 rows of x, w in 4 bits and groups of 64, on tensor cores; the body of a
// kernel that MLX compiles. x: [M, K], w: [N, K / 8], s, b: [N, K / 64], y: [M, N]; all but w in bfloat16;
// TILES: M / 8, rounded up.
//
// A block makes 16 outputs, its warps share K, 256 at a time. A code c becomes the bfloat16 128 + c by two
// bit operations, so the products are too large by 128 times the sum of x, which a product with ones
// gives. In a product of 16 by 16 with 16 by 8 it does not matter which 16 of K are together: a thread
// takes what lies together in memory.
const int M = x_shape[0], K = x_shape[1], N = w_shape[0];
constexpr int WARPS = 4;
constexpr int STEP = 256;
constexpr unsigned ONES = 0x3f803f80;
__shared__ float partial[WARPS][TILES][16][8];

// The j-th of four.
const auto bf16_at = [](uint2 four, int j) {
  const unsigned two = j < 2 ? four.x : four.y;
  return j % 2 ? high(two) : low(two);
};
const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
const int g = lane / 4, t = lane % 4;
const size_t row = blockIdx.x * 16 + g;
const uint2* w0 = reinterpret_cast<const uint2*>(w) + row * (K / 16) + t;
const uint2* w1 = w0 + 8 * (K / 16);
const uint2* s0 = reinterpret_cast<const uint2*>(s) + row * (K / STEP);
const uint2* b0 = reinterpret_cast<const uint2*>(b) + row * (K / STEP);

float sums[TILES][4] = {};
for (int k = warp * STEP; k < K; k += WARPS * STEP) {
  uint2 codes[2][4];
  #pragma unroll
  for (int j = 0; j < 4; j++) {
    codes[0][j] = __ldcs(w0 + k / 16 + 4 * j);
    codes[1][j] = __ldcs(w1 + k / 16 + 4 * j);
  }
  const uint2 scales[2] = {s0[k / STEP], s0[8 * (K / STEP) + k / STEP]};
  const uint2 biases[2] = {b0[k / STEP], b0[8 * (K / STEP) + k / STEP]};
  #pragma unroll
  for (int j = 0; j < 4; j++) {
    float scale[2], bias[2];
    #pragma unroll
    for (int r = 0; r < 2; r++) {
      scale[r] = bf16_at(scales[r], j);
      bias[r] = bf16_at(biases[r], j) - 128.f * scale[r];
    }
    #pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      const int n = tile * 8 + g;
      const uint4* xs = reinterpret_cast<const uint4*>(x + (size_t)n * K + k + j * 64 + t * 16);
      float dots[4] = {}, total[4] = {};
      #pragma unroll
      for (int half = 0; half < 2; half++) {
        const uint4 v = n < M ? xs[half] : make_uint4(0, 0, 0, 0);
        const unsigned c0 = half ? codes[0][j].y : codes[0][j].x;
        const unsigned c1 = half ? codes[1][j].y : codes[1][j].x;
        const unsigned x04 = __byte_perm(v.x, v.z, 0x5410), x15 = __byte_perm(v.x, v.z, 0x7632);
        const unsigned x26 = __byte_perm(v.y, v.w, 0x5410), x37 = __byte_perm(v.y, v.w, 0x7632);
        multiply(dots, widened(c0, 0), widened(c1, 0), widened(c0, 4), widened(c1, 4), x04, x15);
        multiply(total, ONES, ONES, ONES, ONES, x04, x15);
        multiply(dots, widened(c0, 8), widened(c1, 8), widened(c0, 12), widened(c1, 12), x26, x37);
        multiply(total, ONES, ONES, ONES, ONES, x26, x37);
      }
      #pragma unroll
      for (int i = 0; i < 4; i++)
        sums[tile][i] += scale[i / 2] * dots[i] + bias[i / 2] * total[i];
    }
  }
}
#pragma unroll
for (int tile = 0; tile < TILES; tile++)
  #pragma unroll
  for (int i = 0; i < 4; i++)
    partial[warp][tile][g + 8 * (i / 2)][2 * t + i % 2] = sums[tile][i];
__syncthreads();
for (int i = threadIdx.x; i < M * 16; i += WARPS * 32) {
  const int n = i / 16, r = i % 16;
  float sum = 0.f;
  for (int other = 0; other < WARPS; other++) sum += partial[other][n / 8][r][n % 8];
  y[(size_t)n * N + blockIdx.x * 16 + r] = sum;
}
