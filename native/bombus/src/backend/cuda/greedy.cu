// The highest logit of each row, the first of equals, and whether any is NaN: a block for each row.
// logits: [rows, VOCAB] in float32 -> ids, broken: [rows]
const float* own = logits + (size_t)blockIdx.x * VOCAB;
constexpr float LEAST = -3.402823466e38f;
float best = LEAST;
int place = VOCAB;
bool bad = false;
const auto see = [&](float logit, int at) {
  bad |= logit != logit;
  if (logit > best || (logit == best && at < place)) best = logit, place = at;
};
constexpr int FOURS = VOCAB % 4 == 0 ? VOCAB / 4 : 0;
#pragma unroll 8
for (int i = threadIdx.x; i < FOURS; i += blockDim.x) {
  const float4 four = reinterpret_cast<const float4*>(own)[i];
  see(four.x, i * 4), see(four.y, i * 4 + 1), see(four.z, i * 4 + 2), see(four.w, i * 4 + 3);
}
for (int i = FOURS * 4 + threadIdx.x; i < VOCAB; i += blockDim.x) see(own[i], i);
const auto join = [&] {
#pragma unroll
  for (int other = 16; other > 0; other /= 2) {
    const int at = __shfl_xor_sync(0xffffffff, place, other);
    const float logit = __shfl_xor_sync(0xffffffff, best, other);
    if (logit > best || (logit == best && at < place)) best = logit, place = at;
  }
  bad = __any_sync(0xffffffff, bad);
};
join();
__shared__ float bests[32];
__shared__ int places[32];
__shared__ bool bads[32];
const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
if (lane == 0) bests[warp] = best, places[warp] = place, bads[warp] = bad;
__syncthreads();
if (warp > 0) return;
best = lane < warps ? bests[lane] : LEAST;
place = lane < warps ? places[lane] : VOCAB;
bad = lane < warps && bads[lane];
join();
if (lane == 0) ids[blockIdx.x] = place < VOCAB ? place : 0, broken[blockIdx.x] = bad;
