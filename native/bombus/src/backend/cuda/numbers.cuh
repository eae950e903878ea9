// Numbers of 16 bits, and what several kernels do with them.

typedef unsigned short bf16;
typedef unsigned long long word;

constexpr int PAGE = 64;    // positions in a page of keys and values
constexpr float LEAST = -3e38f;  // instead of minus infinity

__device__ inline float low(unsigned two) { return __uint_as_float(two << 16); }
__device__ inline float high(unsigned two) { return __uint_as_float(two & 0xffff0000); }
__device__ inline float widen(bf16 x) { return __uint_as_float((unsigned)x << 16); }
__device__ inline bf16 narrow(float x) { return (bf16)pack_bf16(x, 0.f); }

// Two codes of 4 bits as bfloat16, each OFFSET more: 128 has the exponent at which the last bit of the mantissa is 1.
constexpr unsigned OFFSET = 0x43004300;
__device__ inline unsigned widened(unsigned codes, int shift) { return ((codes >> shift) & 0x000f000f) | OFFSET; }

__device__ inline float warp_sum(float x) {
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffff, x, lane);
  return x;
}

__device__ inline float warp_max(float x) {
  for (int lane = 16; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, lane));
  return x;
}

// What scores are multiplied by where weights are powers of 2. bits: of a factor of the model's own; 0 is dim^-0.5.
__device__ inline float score_factor(int dim, int bits) {
  const float factor = bits ? __uint_as_float((unsigned)bits) : rsqrtf((float)dim);
  return factor * 1.44269504f;
}

// What queries at a position are multiplied by. beta_bits: of a float; 0 is none
__device__ inline float query_factor(int at, int beta_bits, int context) {
  if (!beta_bits) return 1.f;
  return widen(narrow(1.f + __uint_as_float((unsigned)beta_bits) * logf(1.f + at / context)));
}

// silu(gate) * up or gelu(gate) * up: both are gate / (1 + e^-u); GELU by tanh.
__device__ inline float gated(float gate, float up, bool gelu) {
  const float u = gelu ? 1.5957691f * (gate + 0.044715f * gate * gate * gate) : gate;
  return gate / (1.f + __expf(-u)) * up;
}

struct Angle {
  float sine, cosine;
};

// Of numbers i and i + dim / 2 of a head at a position, as in mlx's fast.rope with traditional=False.
__device__ inline Angle angle(int at, int i, int dim, float theta) {
  Angle angle;
  sincosf(at * exp2f(-log2f(theta) * i / (dim / 2)), &angle.sine, &angle.cosine);
  return angle;
}

// The same where `rotation` has radians a position of every pair, and behind them what the head is multiplied by.
__device__ inline Angle angle_of(int at, int i, int dim, const float* rotation) {
  Angle angle;
  sincosf(at * rotation[i], &angle.sine, &angle.cosine);
  angle.sine *= rotation[dim / 2], angle.cosine *= rotation[dim / 2];
  return angle;
}

// A head, normed: lane l has the numbers l, l + 32, ... of it and of the norm.
template <int DIM>
__device__ void norm_head(float (&x)[DIM / 32], const float (&norm)[DIM / 32], float eps) {
  float square = 0.f;
#pragma unroll
  for (int i = 0; i < DIM / 32; i++) square += x[i] * x[i];
  const float factor = rsqrtf(warp_sum(square) / DIM + eps);
#pragma unroll
  for (int i = 0; i < DIM / 32; i++) x[i] *= factor * norm[i];
}

// A head, rotated; angles: those of l, l + 32, ...
template <int DIM>
__device__ void rotate_head(float (&x)[DIM / 32], const Angle (&angles)[DIM / 64]) {
#pragma unroll
  for (int i = 0; i < DIM / 64; i++) {
    const float one = x[i], other = x[i + DIM / 64];
    x[i] = one * angles[i].cosine - other * angles[i].sine;
    x[i + DIM / 64] = one * angles[i].sine + other * angles[i].cosine;
  }
}
