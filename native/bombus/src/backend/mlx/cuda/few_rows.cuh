// Two codes as bfloat16: 128 has the exponent at which the last bit of the mantissa is 1.
__device__ inline unsigned widened(unsigned codes, int shift) {
  return ((codes >> shift) & 0x000f000f) | 0x43004300;
}

// The j-th of four bfloat16.
__device__ inline float bf16_at(uint2 four, int j) {
  const unsigned two = j < 2 ? four.x : four.y;
  return __uint_as_float(j % 2 ? two & 0xffff0000 : two << 16);
}
