// Norms (where QK_NORM) and rotates (where ROTATED) the heads of q and k, scales those of q, for some positions of a sequence, writes k and v to its pages, and
// lays out what these see of it, as attention wants it: from the position on that the first sees, where there is a WINDOW.
// q, k, v: [rows, heads * DIM] (their rows may lie apart); plan: the first position, and pages; layer: its number;
// rotation: as `angle_of` takes it, where SCALED.
// -> queries [HEADS, rows, DIM], keys and values [KV_HEADS, positions that are seen, DIM]
const int count = q_shape[0], start = (int)plan[0];
const int seen = WINDOW && start + 1 > WINDOW ? start + 1 - WINDOW : 0, all = start + count - seen;
const int warps = gridDim.x * blockDim.x / 32, lane = threadIdx.x % 32;
const bf16* sources[3] = {reinterpret_cast<const bf16*>(q), reinterpret_cast<const bf16*>(k),
                          reinterpret_cast<const bf16*>(v)};
const long long apart[3] = {q_strides[0], k_strides[0], v_strides[0]};
const bf16* norms[2] = {reinterpret_cast<const bf16*>(q_norm), reinterpret_cast<const bf16*>(k_norm)};
bf16* to[3] = {reinterpret_cast<bf16*>(queries), reinterpret_cast<bf16*>(keys),
               reinterpret_cast<bf16*>(values)};
const int fresh = count * (HEADS + 2 * KV_HEADS), items = fresh + (start - seen) * 2 * KV_HEADS;
for (int item = (blockIdx.x * blockDim.x + threadIdx.x) / 32; item < items; item += warps) {
  const bool is_fresh = item < fresh;
  const int rest = is_fresh ? item : item - fresh, heads = is_fresh ? HEADS + 2 * KV_HEADS : 2 * KV_HEADS;
  const int row = rest / heads;
  int head = rest % heads + (is_fresh ? 0 : HEADS), kind = 0;
  if (head >= HEADS) kind = 1 + (head - HEADS) / KV_HEADS, head = (head - HEADS) % KV_HEADS;
  const int at = is_fresh ? start + row : seen + row;
  // A page has keys as [PAGE, DIM], values as [DIM, PAGE].
  bf16* in_page = nullptr;
  const int apart_in_page = kind == 2 ? PAGE : 1;
  if (kind > 0)
    in_page = reinterpret_cast<bf16*>(plan[1 + at / PAGE]) +
              (size_t)(((int)layer[0] * 2 + kind - 1) * KV_HEADS + head) * PAGE * DIM +
              at % PAGE * (kind == 2 ? 1 : DIM);
  bf16* out = to[kind] + ((size_t)head * (kind ? all : count) + (kind ? at - seen : row)) * DIM;
  const bf16* from = is_fresh ? sources[kind] + row * apart[kind] + head * DIM : in_page;
  const int step = is_fresh ? 1 : apart_in_page;
  float x[DIM / 32];
  for (int i = 0; i < DIM / 32; i++) x[i] = widen(from[(lane + 32 * i) * step]);
  if (is_fresh && kind < 2) {
    if (QK_NORM) {
      float norm[DIM / 32];
      for (int i = 0; i < DIM / 32; i++) norm[i] = widen(norms[kind][lane + 32 * i]);
      norm_head<DIM>(x, norm, __uint_as_float((unsigned)EPS_BITS));
    }
    if (ROTATED) {
      Angle angles[DIM / 64];
      for (int i = 0; i < DIM / 64; i++)
        angles[i] = SCALED ? angle_of(at, lane + 32 * i, DIM, rotation)
                           : angle(at, lane + 32 * i, DIM, __uint_as_float((unsigned)THETA_BITS));
      rotate_head<DIM>(x, angles);
    }
  }
  if (is_fresh && kind == 0)
    for (int i = 0; i < DIM / 32; i++) x[i] *= query_factor(at, QUERY_BETA_BITS, QUERY_CONTEXT);
  for (int i = 0; i < DIM / 32; i++) {
    const bf16 number = narrow(x[i]);
    out[lane + 32 * i] = number;
    if (is_fresh && kind) in_page[(lane + 32 * i) * apart_in_page] = number;
  }
}
