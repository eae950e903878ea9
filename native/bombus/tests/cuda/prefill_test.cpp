// Attention of a prompt's rows over pages (append.cu, attend.cu), in the emulator, compared with its definition.

#include "cuda.hpp"
#include "numbers.cuh"

using emulator::float_of;

#ifndef HEAD_DIM
#define HEAD_DIM 64
#endif
constexpr int HEADS = 4, KV_HEADS = 2, DIM = HEAD_DIM, LAYERS = 2, LAYER = 1;
constexpr int Q_WIDTH = HEADS * DIM, KV_WIDTH = KV_HEADS * DIM, ROW = Q_WIDTH + 2 * KV_WIDTH;
constexpr unsigned EPS_BITS = std::bit_cast<unsigned>(1e-6f), THETA_BITS = std::bit_cast<unsigned>(1e4f);
constexpr size_t PAGE_NUMBERS = (size_t)LAYERS * 2 * KV_HEADS * PAGE * DIM;
constexpr double MOST_MEAN = 1e-2, MOST_SINGLE = 0.15;

// What a layer may have.
struct Layer {
  int window;
  bool rotated, normed, scaled;
  float score_factor;  // 0: DIM^-0.5
  float query_beta = 0;
};

template <Layer L>
void append(const bf16* q, const bf16* k, const bf16* v, const bf16* q_norm, const bf16* k_norm, const word* plan,
            const int* layer, const float* rotation, bf16* queries, bf16* keys, bf16* values, int rows) {
  constexpr int WINDOW = L.window;
  constexpr bool ROTATED = L.rotated, QK_NORM = L.normed, SCALED = L.scaled;
  constexpr int QUERY_BETA_BITS = std::bit_cast<int>(L.query_beta), QUERY_CONTEXT = 48;
  const int q_shape[] = {rows, Q_WIDTH};
  const long long q_strides[] = {ROW, 1}, k_strides[] = {ROW, 1}, v_strides[] = {ROW, 1};
#include "append.cu"
}

template <Layer L>
void attend(const bf16* q, const bf16* k, const bf16* v, bf16* y, int all_rows, int all_positions) {
  constexpr int WINDOW = L.window, SCORE_FACTOR_BITS = std::bit_cast<int>(L.score_factor);
  const int q_shape[] = {1, HEADS, all_rows, DIM}, k_shape[] = {1, KV_HEADS, all_positions, DIM};
#include "attend.cu"
}

emulator::Random generator{1};

double normal() {
  double sum = 0;
  for (int i = 0; i < 6; i++) sum += double(generator() >> 11) / (1ull << 53) - 0.5;
  return sum * std::sqrt(2.0);
}
bf16 narrowed(double x) { return (bf16)emulator::to_bf16(float(x)); }
double rounded(double x) { return float_of(narrowed(x)); }
struct alignas(16) Aligned {
  unsigned char bytes[16];
};
// NaN, at addresses that copies may take.
struct Numbers {
  explicit Numbers(size_t count) : all(count / 8 + 1) { memset(all.data(), emulator::POISON, all.size() * 16); }
  bf16* data() { return reinterpret_cast<bf16*>(all.data()); }
  bf16& operator[](size_t i) { return data()[i]; }
  std::vector<Aligned> all;
};

// A prompt's rows from `start` on, of a sequence that has all positions before.
template <Layer L> struct Case {
  int start, rows, seen = L.window && start + 1 > L.window ? start + 1 - L.window : 0;
  Numbers qkv{(size_t)rows * ROW}, norms{2 * DIM};
  std::vector<float> rotation = std::vector<float>(DIM / 2 + 1);
  std::vector<Numbers> pages;
  std::vector<word> plan;

  Case(int start, int rows) : start(start), rows(rows) {
    for (int i = 0; i < rows * ROW; i++) qkv[i] = narrowed(normal());
    for (int i = 0; i < 2 * DIM; i++) norms[i] = narrowed(1 + 0.3 * normal());
    for (int i = 0; i < DIM / 2; i++) rotation[i] = float(std::pow(1e4, -2.0 * i / DIM) / (i % 3 + 1));
    rotation[DIM / 2] = 1.25f;
    plan.push_back(start);
    for (int first = 0; first < start + rows; first += PAGE) {
      Numbers& page = pages.emplace_back(PAGE_NUMBERS);
      for (int position = first; position < std::min(first + PAGE, start); position++)
        for (int i = 0; i < 2 * KV_WIDTH; i++) number(position, i) = narrowed(normal());
      // Pages that no row sees are not there.
      plan.push_back(first + PAGE <= seen ? 0 : reinterpret_cast<word>(page.data()));
    }
  }

  // Of a position's key, then of its value.
  bf16& number(int position, int i) {
    const int kind = i / KV_WIDTH, head = i % KV_WIDTH / DIM, at = position % PAGE, own = i % DIM;
    const size_t first = (((size_t)LAYER * 2 + kind) * KV_HEADS + head) * PAGE * DIM;
    return pages[position / PAGE][first + (kind ? own * PAGE + at : at * DIM + own)];
  }

  std::vector<double> rotated(const bf16* x, int norm, int at) {
    double square = 0;
    for (int i = 0; i < DIM; i++) square += (double)float_of(x[i]) * float_of(x[i]);
    const double factor = L.normed ? 1 / std::sqrt(square / DIM + 1e-6) : 1;
    const auto normed = [&](int i) { return float_of(x[i]) * factor * (L.normed ? float_of(norms[norm * DIM + i]) : 1); };
    std::vector<double> y(DIM);
    for (int i = 0; i < DIM / 2; i++) {
      const double angle = L.rotated ? at * (L.scaled ? rotation[i] : std::pow(1e4, -2.0 * i / DIM)) : 0;
      const double amplitude = L.rotated && L.scaled ? 1.25 : 1;
      const double one = amplitude * normed(i), other = amplitude * normed(i + DIM / 2);
      y[i] = rounded(one * std::cos(angle) - other * std::sin(angle));
      y[i + DIM / 2] = rounded(one * std::sin(angle) + other * std::cos(angle));
    }
    return y;
  }

  std::vector<double> attended(int row, int head) {
    auto q = rotated(&qkv[(size_t)row * ROW + head * DIM], 0, start + row);
    for (double& x : q) x = rounded(x * rounded(1 + L.query_beta * std::log(1 + (start + row) / 48)));
    const int at = start + row, from = head / (HEADS / KV_HEADS) * DIM;
    std::vector<double> sums(DIM);
    double total = 0;
    for (int position = L.window ? std::max(at + 1 - L.window, 0) : 0; position <= at; position++) {
      double score = 0;
      for (int i = 0; i < DIM; i++) score += q[i] * float_of(number(position, from + i));
      const double weight = std::exp(score * (L.score_factor ? L.score_factor : 1 / std::sqrt(DIM)));
      total += weight;
      for (int i = 0; i < DIM; i++) sums[i] += weight * float_of(number(position, KV_WIDTH + from + i));
    }
    for (double& sum : sums) sum /= total;
    return sums;
  }

  bool good(const char* name) {
    const int positions = start + rows - seen, layer[] = {LAYER};
    Numbers queries((size_t)rows * Q_WIDTH), keys((size_t)positions * KV_WIDTH), values((size_t)positions * KV_WIDTH),
        y((size_t)rows * Q_WIDTH);
    emulator::launch(3, 256, 1, [&] {
      append<L>(&qkv[0], &qkv[Q_WIDTH], &qkv[Q_WIDTH + KV_WIDTH], &norms[0], &norms[DIM], plan.data(), layer,
                rotation.data(), queries.data(), keys.data(), values.data(), rows);
    });
    emulator::launch(HEADS * ((rows + 63) / 64), 128, 2, [&] {
      attend<L>(queries.data(), keys.data(), values.data(), y.data(), rows, positions);
    });
    double sum = 0, most = 0, magnitude = 0;
    const auto see = [&](double found, double expected) {
      const double off = found == found ? std::abs(found - expected) : INFINITY;
      sum += off, most = std::max(most, off), magnitude += std::abs(expected);
    };
    for (int row = 0; row < rows; row++) {
      for (int head = 0; head < KV_HEADS; head++) {
        const auto k = rotated(&qkv[(size_t)row * ROW + Q_WIDTH + head * DIM], 1, start + row);
        for (int i = 0; i < DIM; i++) see(float_of(number(start + row, head * DIM + i)), k[i]);
      }
      for (int head = 0; head < HEADS; head++) {
        const auto expected = attended(row, head);
        for (int i = 0; i < DIM; i++) see(float_of(y[(size_t)row * Q_WIDTH + head * DIM + i]), expected[i]);
      }
    }
    const double mean = sum / magnitude, single = most / magnitude * rows * (KV_WIDTH + Q_WIDTH);
    const bool good = mean <= MOST_MEAN && single <= MOST_SINGLE;
    printf("%s, %d rows from %d on: mean %.1e most %.1e%s\n", name, rows, start, mean, single, good ? "" : ": FAILED");
    return good;
  }
};

// Of a window less than a page, one of several, and the first rows, which see less than it.
template <Layer L> bool works(const char* name) {
  bool good = true;
  for (const auto& [start, rows] : {std::pair{0, 70}, {1, 1}, {63, 65}, {200, 130}, {333, 3}})
    good &= Case<L>(start, rows).good(name);
  return good;
}

int main() {
  emulator::catch_faults();
  bool good = works<Layer{0, true, true, false, 0}>("all positions");
  good &= works<Layer{0, true, false, true, 0.05f, 0.25f}>("frequencies and factors of scores and queries");
  good &= works<Layer{100, true, true, false, 0}>("window of 100");
  good &= works<Layer{33, false, false, false, 0}>("window of 33, not rotated");
  good &= works<Layer{128, true, false, true, 0}>("window of 128");
  return !good;
}
