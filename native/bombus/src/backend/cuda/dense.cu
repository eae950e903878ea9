// A weight of 4 bits in groups of 64 as bfloat16, rounded once: codes [N, K / 8], scales and biases
// [N, K / 64] -> y: [N, K]; eight numbers for each thread.
const size_t all = (size_t)codes_shape[0] * codes_shape[1];
const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
if (i < all) {
  const unsigned eight = codes[i];
  const float scale = widen(reinterpret_cast<const bf16*>(scales)[i / 8]);
  const float bias = widen(reinterpret_cast<const bf16*>(biases)[i / 8]);
  auto two = [&](int shift) {
    return pack_bf16((eight >> shift & 15) * scale + bias, (eight >> shift + 4 & 15) * scale + bias);
  };
  reinterpret_cast<uint4*>(y)[i] = make_uint4(two(0), two(8), two(16), two(24));
}
