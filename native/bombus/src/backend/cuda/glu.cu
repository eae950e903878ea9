// silu(gate) * up, or gelu(gate) * up, in bfloat16, eight numbers for each thread; gate and up: [rows, width], whose rows may lie
// apart -> y: [rows, width]
const int columns = gate_shape[1] / 8;
const size_t all = (size_t)gate_shape[0] * columns;
const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
if (i < all) {
  const size_t row = i / columns, column = i % columns * 8;
  const uint4 a = *reinterpret_cast<const uint4*>(gate + row * gate_strides[0] + column);
  const uint4 b = *reinterpret_cast<const uint4*>(up + row * up_strides[0] + column);
  auto two = [](unsigned a, unsigned b) {
    return pack_bf16(gated(low(a), low(b), GELU), gated(high(a), high(b), GELU));
  };
  reinterpret_cast<uint4*>(y)[i] = make_uint4(two(a.x, b.x), two(a.y, b.y), two(a.z, b.z), two(a.w, b.w));
}
