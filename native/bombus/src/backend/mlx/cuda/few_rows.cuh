// Two codes as bfloat16: 128 has the exponent at which the last bit of the mantissa is 1.
__device__ inline unsigned widened(unsigned codes, int shift) {
  return ((codes >> shift) & 0x000f000f) | 0x43004300;
}

// The j-th of four bfloat16.
__device__ inline float bf16_at(uint2 four, int j) {
  const unsigned two = j < 2 ? four.x : four.y;
  return __uint_as_float(j % 2 ? two & 0xffff0000 : two << 16);
}

// c [16, 8] += a [16, 16] b [16, 8]
__device__ inline void multiply(
    float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
