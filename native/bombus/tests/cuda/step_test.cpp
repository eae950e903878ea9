// The kernel for steps, in the emulator: scales_biases models of random weights, compared with the model's definition.
//
// One program is made for one shape, with the kernel for one tile and that for TILES. `kernel.inc` joins the kernel's
// sources in the order in which the engine joins them, behind `layout.inc`, which layout.rs of the engine prints.
//
// step_test BLOCKS SEEDS ROWS...: steps of so many rows.

#include "cuda.hpp"

namespace one_tile {
constexpr int TILES = 1;
#include "kernel.inc"
}  // namespace one_tile

namespace more_tiles {
constexpr int TILES = 4;
#include "kernel.inc"
}  // namespace more_tiles

// What lies where is the same for both.
using namespace more_tiles;
using emulator::float_of;

typedef std::vector<double> Numbers;

constexpr double MOST_MEAN = 1e-2, MOST_SINGLE = 0.15;  // differences, as fractions of the mean magnitude
constexpr double EMBEDDING_FACTOR = std::bit_cast<float>((unsigned)EMBEDDING_FACTOR_BITS);
constexpr double RESIDUAL_FACTOR = std::bit_cast<float>((unsigned)RESIDUAL_FACTOR_BITS);
constexpr double LOGITS_FACTOR = std::bit_cast<float>((unsigned)LOGITS_FACTOR_BITS);
const double SCORE_FACTOR =
    SCORE_FACTOR_BITS ? (double)std::bit_cast<float>((unsigned)SCORE_FACTOR_BITS) : 1 / std::sqrt(DIM);
constexpr size_t PAGE_NUMBERS = (size_t)LAYERS * 2 * KV_HEADS * PAGE * DIM;

// Memory of the card, at the end of which there is none: whoever reads on is caught. It begins as NaN.
template <class T> class Array {
 public:
  explicit Array(size_t count) : count(count) {
    const size_t most = sysconf(_SC_PAGESIZE);
    bytes = (count * sizeof(T) + 255) / 256 * 256;
    all = (bytes + most - 1) / most * most + most;
    start = static_cast<char*>(mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(start + all - most, most, PROT_NONE);
    data = reinterpret_cast<T*>(start + all - most - bytes);
    poison();
  }
  Array(Array&& other) : Array(other) { other.start = nullptr; }
  ~Array() {
    if (start) munmap(start, all);
  }
  void poison() const { memset(static_cast<void*>(data), emulator::POISON, bytes); }
  T& operator[](size_t i) const { return data[i]; }
  word address() const { return reinterpret_cast<word>(data); }

  T* data;
  size_t count, bytes;

 private:
  Array(const Array&) = default;
  char* start;
  size_t all;
};

emulator::Random generator{1};

// About normal, of variance 1.
double normal() {
  double sum = 0;
  for (int i = 0; i < 6; i++) sum += double(generator() >> 11) / (1ull << 53) - 0.5;
  return sum * std::sqrt(2.0);
}
int below(int most) { return int(generator() % most); }
double rounded(double x) { return float_of(emulator::to_bf16(float(x))); }
bf16 narrowed(double x) { return (bf16)emulator::to_bf16(float(x)); }

Array<bf16> random_numbers(size_t count, double mean, double spread) {
  Array<bf16> numbers(count);
  for (size_t i = 0; i < count; i++) numbers[i] = narrowed(mean + spread * normal());
  return numbers;
}

// A weight [n, k] of 4 bits.
struct Weight {
  Weight(int n, int k, double spread, bool swiglu)
      : n(n), k(k), codes((size_t)n * k / 8), scales((size_t)n * k / 64), biases(scales.count),
        scales_biases((size_t)(n + 63) / 64 * 64 * ((k / 64 + 3) / 4 * 4)) {
    for (size_t i = 0; i < codes.count; i++) codes[i] = (unsigned)generator();
    for (size_t i = 0; i < scales.count; i++) {
      const double scale = spread / 4.6 * (1 + 0.3 * normal());
      scales[i] = narrowed(scale), biases[i] = narrowed(scale * (-7.5 + normal()));
    }
    swizzle(swiglu);
  }

  // As `swizzled` of step.rs.
  void swizzle(bool swiglu) {
    const int groups = k / 64, quads = (groups + 3) / 4;
    memset(scales_biases.data, 0, scales_biases.bytes);
    for (int output = 0; output < n; output++)
      for (int group = 0; group < groups; group++) {
        const int half = output % (n / 2);
        const int tile = swiglu ? half / 8 : output / 16;
        const int row = swiglu ? half % 8 + output / (n / 2) * 8 : output % 16;
        const size_t from = (size_t)output * groups + group;
        scales_biases[(((size_t)tile * quads + group / 4) * 16 + row) * 4 + group % 4] =
            scales[from] | (unsigned)biases[from] << 16;
      }
  }

  double number(int output, int input) const {
    const size_t group = ((size_t)output * k + input) / 64;
    const unsigned code = codes[((size_t)output * k + input) / 8] >> input % 8 * 4 & 15;
    return code * (double)float_of(scales[group]) + float_of(biases[group]);
  }

  // x w^T. With more tiles, the kernel rounds weights.
  std::vector<Numbers> times(const std::vector<Numbers>& x, bool round) const {
    std::vector<Numbers> y(x.size(), Numbers(n));
    Numbers weights(k);
    for (int output = 0; output < n; output++) {
      for (int i = 0; i < k; i++) weights[i] = round ? rounded(number(output, i)) : number(output, i);
      for (size_t row = 0; row < x.size(); row++) {
        double sums[4] = {};
        for (int i = 0; i < k; i++) sums[i % 4] += weights[i] * x[row][i];
        y[row][output] = sums[0] + sums[1] + sums[2] + sums[3];
      }
    }
    return y;
  }

  int n, k;
  Array<unsigned> codes;
  Array<bf16> scales, biases;
  Array<unsigned> scales_biases;
};

struct Layer {
  Weight qkv{QKV_WIDTH, HIDDEN, 1 / std::sqrt(HIDDEN), false};
  Weight o{HIDDEN, Q_WIDTH, 1 / std::sqrt(Q_WIDTH), false};
  Weight gate_up{2 * INNER, HIDDEN, 1 / std::sqrt(HIDDEN), true};
  Weight down{HIDDEN, INNER, 2 / std::sqrt(INNER), false};
  Array<bf16> input_norm = random_numbers(HIDDEN, 1, 0.3), post_norm = random_numbers(HIDDEN, 1, 0.3);
  Array<bf16> q_norm = random_numbers(DIM, 1.5, 0.3), k_norm = random_numbers(DIM, 1.5, 0.3);
  Array<bf16> bias = random_numbers(QKV_WIDTH, 0, 1);
  Array<bf16> o_bias = random_numbers(O_BIAS ? HIDDEN : 0, 0, 1), down_bias = random_numbers(MLP_BIAS ? HIDDEN : 0, 0, 1);
  Array<bf16> after_attention = random_numbers(POST_NORMS ? HIDDEN : 0, 1, 0.3);
  Array<bf16> after_mlp = random_numbers(POST_NORMS ? HIDDEN : 0, 1, 0.3);
  Array<bf16> gate_up_bias = random_numbers(MLP_BIAS ? 2 * INNER : 0, 0, 1);
};

struct Model {
  std::vector<Layer> layers{LAYERS};
  Weight embedding{VOCAB, HIDDEN, 1, false}, head{VOCAB, HIDDEN, 1 / std::sqrt(HIDDEN), false};
  Array<bf16> norm = random_numbers(HIDDEN, 1, 0.3);
  Array<float> rotation{ROTATIONS * (DIM / 2 + 1)};

  Model() {
    // Llama 3's shape of it: the slower half by 8; and YaRN's larger heads.
    for (int i = 0; i < DIM / 2; i++) rotation[i] = frequency(i) / (i < DIM / 4 ? 1 : 8);
    rotation[DIM / 2] = 1.25f;
    if (ROTATIONS == 1) return;
    float* second = &rotation[DIM / 2 + 1];
    for (int i = 0; i < DIM / 2; i++) second[i] = std::pow(1e3, -2.0 * i / DIM);
    second[DIM / 2] = 1.f;
  }

  static double frequency(int pair) {
    return std::pow(std::bit_cast<float>((unsigned)THETA_BITS), -2.0 * pair / DIM);
  }

  // What the layers differ in: every other one is not rotated.
  static bool unrotated(int layer) { return SOME_UNROTATED && layer % 2; }
  static bool windowed(int layer) { return WINDOW && !(SOME_FULL && layer % 2); }
  // Of those with a window, the second.
  static int rotation_of(int layer) { return ROTATIONS > 1 && windowed(layer); }
  static word flags(int layer) { return unrotated(layer) * UNROTATED + windowed(layer) * WINDOWED + rotation_of(layer) * SECOND_ROTATION; }
  // The first position that one sees.
  static int first_seen(int at, bool windowed) { return windowed ? std::max(at + 1 - WINDOW, 0) : 0; }

  static double query_factor(int at) {
    return rounded(1 + std::bit_cast<float>((unsigned)QUERY_BETA_BITS) * std::log(1 + at / QUERY_CONTEXT));
  }

  // As `table` of step.rs.
  Array<word> table() const {
    Array<word> table(LAYERS * LAYER_WORDS + MODEL_WORDS);
    memset(table.data, 0, table.bytes);
    const auto place = [](word* to, const Weight& weight) {
      to[0] = weight.codes.address(), to[1] = weight.scales_biases.address();
    };
    for (int i = 0; i < LAYERS; i++) {
      word* own = &table[i * LAYER_WORDS];
      const Layer& layer = layers[i];
      place(own + QKV, layer.qkv), place(own + O, layer.o);
      place(own + GATE_UP, layer.gate_up), place(own + DOWN, layer.down);
      own[INPUT_NORM] = layer.input_norm.address(), own[POST_NORM] = layer.post_norm.address();
      if (QK_NORM) own[Q_NORM] = layer.q_norm.address(), own[K_NORM] = layer.k_norm.address();
      if (QKV_BIAS) own[BIAS_OF_QKV] = layer.bias.address();
      if (O_BIAS) own[BIAS_OF_O] = layer.o_bias.address();
      if (MLP_BIAS) own[BIAS_OF_GATE_UP] = layer.gate_up_bias.address(), own[BIAS_OF_DOWN] = layer.down_bias.address();
      if (POST_NORMS)
        own[AFTER_ATTENTION] = layer.after_attention.address(), own[AFTER_MLP] = layer.after_mlp.address();
      own[FLAGS] = flags(i);
    }
    word* own = &table[LAYERS * LAYER_WORDS];
    place(own + HEAD, head);
    own[NORM] = norm.address(), own[ROTATION] = rotation.address();
    own[EMBEDDING] = embedding.codes.address();
    own[EMBEDDING + 1] = embedding.scales.address(), own[EMBEDDING + 2] = embedding.biases.address();
    return table;
  }
};

// LoRA A and B of one linear layer; none if its rank is 0.
struct Lora {
  Lora(int in, int out, int rank)
      : in(in), out(out), rank(rank), a(random_numbers((size_t)in * rank, 0, 1 / std::sqrt(in))),
        b(random_numbers((size_t)out * rank, 0, 1 / std::sqrt(rank + 1))) {}

  void add(const Numbers& x, double* y) const {
    for (int r = 0; r < rank; r++) {
      double low = 0;
      for (int i = 0; i < in; i++) low += x[i] * float_of(a[(size_t)i * rank + r]);
      for (int i = 0; i < out; i++) y[i] += scale * low * float_of(b[(size_t)i * rank + r]);
    }
  }

  int in, out, rank;
  float scale;
  Array<bf16> a, b;
};

struct Adapter {
  // `ranks` are those of the loras, again and again.
  explicit Adapter(std::vector<int> ranks, float scale = 0.5f) : words((size_t)LAYERS * LORA_LAYERS * LORA_WORDS) {
    const int ins[] = {HIDDEN, HIDDEN, HIDDEN, Q_WIDTH, HIDDEN, HIDDEN, INNER};
    const int outs[] = {Q_WIDTH, KV_WIDTH, KV_WIDTH, HIDDEN, INNER, INNER, HIDDEN};
    for (int i = 0; i < LAYERS * LORA_LAYERS; i++) {
      const int rank = ranks[i % ranks.size()];
      most_rank = std::max(most_rank, rank);
      Lora& own = loras.emplace_back(ins[i % LORA_LAYERS], outs[i % LORA_LAYERS], rank);
      own.scale = scale;
      words[i * LORA_WORDS] = rank ? own.a.address() : 0, words[i * LORA_WORDS + 1] = rank ? own.b.address() : 0;
      words[i * LORA_WORDS + 2] = rank ? rank | (word)std::bit_cast<unsigned>(own.scale) << 32 : 0;
    }
  }

  int most_rank = 0;
  std::vector<Lora> loras;
  Array<word> words;
};

// Keys and values of the first `at` positions; behind them there is NaN.
struct Sequence {
  explicit Sequence(int at) : at(at) {
    for (int first = 0; first <= at; first += PAGE) {
      const Array<bf16>& page = pages.emplace_back(PAGE_NUMBERS);
      for (size_t i = 0; i < PAGE_NUMBERS; i++) {
        const int position = i / (PAGE * DIM) / KV_HEADS % 2 ? i % PAGE : i % (PAGE * DIM) / DIM;
        if (first + position < at) page[i] = narrowed(normal());
      }
    }
  }

  void next() {
    if (++at % PAGE == 0) pages.emplace_back(PAGE_NUMBERS);
  }

  bf16& number(int layer, int kind, int head, int position, int i) const {
    const size_t first = (((size_t)layer * 2 + kind) * KV_HEADS + head) * PAGE * DIM;
    return pages[position / PAGE][first + (kind ? i * PAGE + position % PAGE : position % PAGE * DIM + i)];
  }

  int at;
  std::vector<Array<bf16>> pages;
};

struct Row {
  int id;
  Sequence* sequence;
  const Adapter* adapter;
};

// The model's definition, in double; what the kernel rounds to bfloat16 is rounded here as well.
struct Reference {
  const Model& model;
  const std::vector<Row>& rows;
  std::vector<Numbers> hidden;
  std::vector<Numbers> keys_and_values;  // of each row: [layers, 2, kv heads, dim]

  Reference(const Model& model, const std::vector<Row>& rows)
      : model(model), rows(rows), keys_and_values(rows.size()) {}

  std::vector<Numbers> logits() {
    for (const Row& row : rows) {
      Numbers& own = hidden.emplace_back(HIDDEN);
      for (int i = 0; i < HIDDEN; i++) own[i] = rounded(rounded(model.embedding.number(row.id, i)) * EMBEDDING_FACTOR);
    }
    for (int layer = 0; layer < LAYERS; layer++) {
      const Layer& own = model.layers[layer];
      auto qkv = normed_product(own.qkv, own.input_norm, layer, {LORA_QKV, LORA_QKV + 1, LORA_QKV + 2});
      if (QKV_BIAS) add_bias(qkv, own.bias);
      std::vector<Numbers> mixed;
      for (size_t row = 0; row < rows.size(); row++) mixed.push_back(attend(row, layer, qkv[row]));
      auto y = product(own.o, mixed, layer, {LORA_O});
      if (O_BIAS) add_bias(y, own.o_bias);
      if (POST_NORMS) norm_rows(y, own.after_attention);
      add(y);
      auto inner = normed_product(own.gate_up, own.post_norm, layer, {LORA_GATE_UP, LORA_GATE_UP + 1});
      if (MLP_BIAS) add_bias(inner, own.gate_up_bias);
      for (Numbers& x : inner) {
        for (int i = 0; i < INNER; i++) x[i] = rounded(activated(x[i]) * x[INNER + i]);
        x.resize(INNER);
      }
      y = product(own.down, inner, layer, {LORA_DOWN});
      if (MLP_BIAS) add_bias(y, own.down_bias);
      if (POST_NORMS) norm_rows(y, own.after_mlp);
      add(y);
    }
    auto y = normed_product(model.head, model.norm, 0, {});
    for (Numbers& row : y)
      for (double& logit : row) logit *= LOGITS_FACTOR;
    return y;
  }

  static double activated(double x) {
    const double pi = std::acos(-1.0);
    if (GELU) return 0.5 * x * (1 + std::tanh(std::sqrt(2 / pi) * (x + 0.044715 * x * x * x)));
    return x / (1 + std::exp(-x));
  }

  static void norm_rows(std::vector<Numbers>& y, const Array<bf16>& norm) {
    for (Numbers& row : y) {
      const double own = factor(row.data(), HIDDEN);
      for (int i = 0; i < HIDDEN; i++) row[i] *= own * float_of(norm[i]);
    }
  }

  static void add_bias(std::vector<Numbers>& y, const Array<bf16>& bias) {
    for (Numbers& row : y)
      for (size_t i = 0; i < row.size(); i++) row[i] += float_of(bias[i]);
  }

  void add(const std::vector<Numbers>& y) {
    for (size_t row = 0; row < rows.size(); row++)
      for (int i = 0; i < HIDDEN; i++) hidden[row][i] += RESIDUAL_FACTOR * y[row][i];
  }

  // With what the adapters' loras at these places add, one after another.
  std::vector<Numbers> product(const Weight& weight, const std::vector<Numbers>& x, int layer,
                               std::vector<int> places) const {
    auto y = weight.times(x, rows.size() > 8);
    for (size_t row = 0; row < rows.size(); row++) {
      double* to = y[row].data();
      for (int place : places) {
        if (!rows[row].adapter) continue;
        const Lora& own = rows[row].adapter->loras[layer * LORA_LAYERS + place];
        own.add(x[row], to);
        to += own.out;
      }
    }
    return y;
  }

  static double factor(const double* x, int count) {
    double square = 0;
    for (int i = 0; i < count; i++) square += x[i] * x[i];
    return 1 / std::sqrt(square / count + std::bit_cast<float>((unsigned)EPS_BITS));
  }

  std::vector<Numbers> normed_product(const Weight& weight, const Array<bf16>& norm, int layer,
                                      std::vector<int> places) const {
    auto x = hidden;
    for (Numbers& own : x)
      for (int i = 0; i < HIDDEN; i++) own[i] = rounded(own[i] * float_of(norm[i]));
    auto y = product(weight, x, layer, places);
    for (size_t row = 0; row < rows.size(); row++) {
      const double own = factor(hidden[row].data(), HIDDEN);
      for (double& number : y[row]) number *= own;
    }
    return y;
  }

  // A head of queries or keys, normed and rotated.
  Numbers rotated(int layer, const double* x, const Array<bf16>& norm, int at) const {
    if (Model::unrotated(layer)) at = 0;
    const float* table = &model.rotation[Model::rotation_of(layer) * (DIM / 2 + 1)];
    const double own = factor(x, DIM), amplitude = SCALED && !Model::unrotated(layer) ? (double)table[DIM / 2] : 1;
    const auto normed = [&](int i) { return amplitude * (QK_NORM ? x[i] * own * float_of(norm[i]) : x[i]); };
    Numbers y(DIM);
    for (int i = 0; i < DIM / 2; i++) {
      const double angle = at * (SCALED ? (double)table[i] : Model::frequency(i));
      const double one = normed(i), other = normed(i + DIM / 2);
      y[i] = rounded(one * std::cos(angle) - other * std::sin(angle));
      y[i + DIM / 2] = rounded(one * std::sin(angle) + other * std::cos(angle));
    }
    return y;
  }

  Numbers attend(size_t row, int layer, const Numbers& qkv) {
    const Layer& own = model.layers[layer];
    const Sequence& sequence = *rows[row].sequence;
    Numbers mixed;
    Numbers fresh[2];
    for (int head = 0; head < KV_HEADS; head++) {
      for (double x : rotated(layer, &qkv[Q_WIDTH + head * DIM], own.k_norm, sequence.at)) fresh[0].push_back(x);
      for (int i = 0; i < DIM; i++) fresh[1].push_back(rounded(qkv[Q_WIDTH + KV_WIDTH + head * DIM + i]));
    }
    for (const Numbers& kind : fresh)
      keys_and_values[row].insert(keys_and_values[row].end(), kind.begin(), kind.end());
    for (int head = 0; head < HEADS; head++) {
      const int from = head / GQA_GROUP;
      Numbers q = rotated(layer, &qkv[head * DIM], own.q_norm, sequence.at);
      for (double& x : q) x = rounded(x * Model::query_factor(sequence.at));
      const auto number = [&](int kind, int position, int i) -> double {
        if (position == sequence.at) return fresh[kind][from * DIM + i];
        return float_of(sequence.number(layer, kind, from, position, i));
      };
      Numbers sums(DIM);
      double total = 0;
      const int first = Model::first_seen(sequence.at, Model::windowed(layer));
      for (int position = first; position <= sequence.at; position++) {
        double score = 0;
        for (int i = 0; i < DIM; i++) score += q[i] * number(0, position, i);
        const double weight = std::exp(score * SCORE_FACTOR);
        total += weight;
        for (int i = 0; i < DIM; i++) sums[i] += weight * number(1, position, i);
      }
      for (double sum : sums) mixed.push_back(rounded(sum / total));
    }
    return mixed;
  }
};

// As fractions of the mean magnitude.
struct Difference {
  double sum = 0, largest = 0, magnitude = 0;
  size_t count = 0;

  void see(double found, double expected) {
    const double own = found == found ? std::abs(found - expected) : INFINITY;
    sum += own, largest = std::max(largest, own), magnitude += std::abs(expected), count++;
  }
  double mean() const { return sum / magnitude; }
  double most() const { return largest / (magnitude / count); }
  bool good() const { return mean() <= MOST_MEAN && most() <= MOST_SINGLE; }
};

// The kernel as the engine has it: its workspace stays from launch to launch.
class Engine {
 public:
  Engine(const Model& model, int blocks) : table(model.table()), blocks(blocks), workspace(WITHOUT_PLAN + PLAN_BYTES) {
    memset(workspace.data, 0, workspace.bytes);
  }

  // Goes on as the last step whose plan was whole, if it may.
  void run(const std::vector<Row>& rows, bool goes_on, unsigned seed, const Array<float>& logits) {
    const Array<unsigned> sampled(rows.size());
    goes_on = goes_on && pages_of(rows) == planned_pages && rows[0].sequence->at != planned_at;
    const Array<word> plan = goes_on ? going_on(rows, sampled) : planned(rows, sampled);
    poison(goes_on);
    const auto* memory = reinterpret_cast<const unsigned*>(workspace.data);
    if (rows.size() <= 8)
      emulator::launch(blocks, one_tile::ALL_THREADS, seed,
                       [&] { one_tile::launch(table.data, plan.data, sampled.data, memory, logits.data); });
    else
      emulator::launch(blocks, more_tiles::ALL_THREADS, seed,
                       [&] { more_tiles::launch(table.data, plan.data, sampled.data, memory, logits.data); });
  }

  // As if the next step went on after another whole plan.
  void lose_plan() { number++, planned_at--; }

 private:
  static constexpr size_t MOST = 64;  // rows that it has room for
  static constexpr size_t WITHOUT_PLAN = SPLITS + rounded(4 * MOST * MOST_SPLITS * HEADS * PARTIAL, 256);
  static constexpr size_t PLAN_BYTES = 1 << 16;

  static size_t pages_of(const std::vector<Row>& rows) {
    size_t pages = 0;
    for (const Row& row : rows) pages += row.sequence->pages.size();
    return pages;
  }

  // As `PlanEncoder` of plan.rs.
  Array<word> going_on(const std::vector<Row>& rows, const Array<unsigned>& sampled) const {
    Array<word> plan(1);
    plan[0] = rows.size() | GOES_ON | (word)(rows[0].sequence->at - planned_at) << 32 | number << 48;
    for (size_t i = 0; i < rows.size(); i++) sampled[i] = rows[i].id;
    return plan;
  }

  // As `plan` of step.rs. Every other id is a sample of another row's.
  Array<word> planned(const std::vector<Row>& rows, const Array<unsigned>& sampled) {
    planned_pages = pages_of(rows), planned_at = rows[0].sequence->at;
    size_t pages = 0;
    for (const Row& row : rows) pages = std::max(pages, row.sequence->pages.size());
    const size_t words = ROW_WORDS + pages, count = rows.size();
    Array<word> plan(HEADER + count * words);
    memset(plan.data, 0, plan.bytes);
    plan[0] = count | ++number << 48, plan[1] = words, plan[3] = WITHOUT_PLAN;
    for (size_t i = 0; i < count; i++) {
      const Row& row = rows[i];
      word* own = &plan[HEADER + i * words];
      sampled[count - 1 - i] = row.id;
      own[0] = (i % 2 ? ~unsigned(count - 1 - i) : unsigned(row.id)) | (word)row.sequence->at << 32;
      own[1] = row.adapter ? row.adapter->words.address() : 0;
      if (row.adapter) plan[2] = std::max(plan[2], (word)row.adapter->most_rank);
      // Pages that no layer sees are not there.
      size_t page = Model::first_seen(row.sequence->at, WINDOW && !SOME_FULL) / PAGE;
      for (; page < row.sequence->pages.size(); page++)
        own[ROW_WORDS + page] = row.sequence->pages[page].address();
    }
    return plan;
  }

  // What no launch may need from before.
  void poison(bool goes_on) const {
    const std::pair<size_t, size_t> areas[] = {
        {HIDDEN_AT, 4 * HIDDEN},  {SQUARES, 4 * (HIDDEN / 16)}, {QKV_AT, 4 * QKV_WIDTH}, {NORMED, 2 * HIDDEN},
        {MIXED, 2 * Q_WIDTH},     {ACTIVE, 2 * INNER},          {ANGLES, 4 * DIM * ROTATIONS},
        {BRANCH, 4 * HIDDEN * POST_NORMS}, {BRANCH_SQUARES, 4 * (HIDDEN / 16) * POST_NORMS},
    };
    for (const auto& [start, bytes] : areas) memset(&workspace[start], emulator::POISON, bytes * MOST_ROWS);
    memset(&workspace[SPLITS], emulator::POISON, (goes_on ? WITHOUT_PLAN : workspace.count) - SPLITS);
  }

  // Of the last whole plan.
  word number = 0;
  size_t planned_pages = 0;
  int planned_at = 0;

  Array<word> table;
  int blocks;
  Array<unsigned char> workspace;
};

struct Test {
  const Model& model;
  Engine& engine;
  int seeds;
  Difference logits, pages;
  int launches = 0;
  word bits = 0;  // a hash of all logits: two versions of the kernel that compute the same have the same
  bool same = true, untouched = true, refused = true, apart = true;

  // The rows' pages one after another.
  static std::vector<bf16> contents(const std::vector<Row>& rows) {
    std::vector<bf16> all;
    for (const Row& row : rows)
      for (const auto& page : row.sequence->pages) all.insert(all.end(), page.data, page.data + PAGE_NUMBERS);
    return all;
  }

  static void poison_fresh(const std::vector<Row>& rows) {
    for (const Row& row : rows)
      for (int i = 0; i < LAYERS * 2 * KV_HEADS * DIM; i++) fresh(row, i) = 0xffff;
  }

  // Of a row's own key and value in all layers, as `Reference::keys_and_values` has them.
  static bf16& fresh(const Row& row, int i) {
    const int head = i / DIM;
    return row.sequence->number(head / KV_HEADS / 2, head / KV_HEADS % 2, head % KV_HEADS, row.sequence->at, i % DIM);
  }

  // A step with all seeds, whose results must be the same to the last bit.
  void step(const std::vector<Row>& rows, bool goes_on) {
    Reference reference(model, rows);
    const auto expected = reference.logits();
    const auto before = contents(rows);
    const Array<float> found(rows.size() * VOCAB);
    std::vector<bf16> first_pages;
    std::vector<float> first;
    for (int seed = 0; seed < seeds; seed++, launches++) {
      found.poison();
      poison_fresh(rows);
      engine.run(rows, goes_on, 1000 * launches + seed, found);
      const auto all = contents(rows);
      if (seed == 0) first.assign(found.data, found.data + found.count), first_pages = all;
      same &= !memcmp(first.data(), found.data, found.count * 4) && all == first_pages;
    }
    for (float logit : first) bits = (bits ^ std::bit_cast<unsigned>(logit)) * 0x100000001b3;
    for (size_t row = 0; row < rows.size(); row++) {
      for (int i = 0; i < VOCAB; i++) logits.see(first[row * VOCAB + i], expected[row][i]);
      for (size_t i = 0; i < reference.keys_and_values[row].size(); i++)
        pages.see(float_of(fresh(rows[row], i)), reference.keys_and_values[row][i]);
    }
    check_untouched(rows, before);
  }

  // But for the rows' own keys and values, pages are as they were.
  void check_untouched(const std::vector<Row>& rows, const std::vector<bf16>& before) {
    std::vector<std::pair<bf16*, bf16>> own;
    for (const Row& row : rows)
      for (int i = 0; i < LAYERS * 2 * KV_HEADS * DIM; i++) own.push_back({&fresh(row, i), fresh(row, i)});
    poison_fresh(rows);
    untouched &= contents(rows) == before;
    for (const auto& [at, number] : own) *at = number;
  }

  // A step that goes on after a plan that never came has NaN in every row.
  void lost_step(const std::vector<Row>& rows) {
    const Array<float> found(rows.size() * VOCAB);
    engine.run(rows, false, 0, found);
    engine.lose_plan();
    engine.run(rows, true, 0, found);
    for (size_t row = 0; row < rows.size(); row++) refused &= found[row * VOCAB] != found[row * VOCAB];
    engine.run(rows, false, 0, found);
    for (size_t row = 0; row < rows.size(); row++) refused &= found[row * VOCAB] == found[row * VOCAB];
  }

  // NaN leaves nothing to the step behind it.
  void broken_step(std::vector<Row> rows, const Adapter& broken) {
    const Array<float> before(rows.size() * VOCAB), after(rows.size() * VOCAB);
    engine.run(rows, false, 0, before);
    auto others = rows;
    for (Row& row : others) row.adapter = &broken;
    engine.run(others, false, 0, after);
    apart &= after[0] != after[0];
    engine.run(rows, false, 0, after);
    apart &= !memcmp(before.data, after.data, before.count * 4);
  }

  bool good() const { return apart && refused && logits.good() && pages.good() && same && untouched; }
};

int main(int count, char** arguments) {
  if (count < 4) return fprintf(stderr, "step_test BLOCKS SEEDS ROWS...\n"), 1;
  emulator::catch_faults();
  const Model model;
  std::vector<Adapter> adapters;
  adapters.emplace_back(std::vector{8});
  adapters.emplace_back(std::vector{0, 16, 24, 32, 40, 0, 48, 56});
  adapters.emplace_back(std::vector{64});
  adapters.emplace_back(std::vector{16, 0, 16, 0, 0, 0, 0});
  const int positions[] = {30, 63, 0, 64, 65, 1, 200, 127, 2500, 128, 191, 2047};
  Engine engine(model, atoi(arguments[1]));
  Test test{model, engine, atoi(arguments[2])};
  int number = 0;
  for (int i = 3; i < count; i++) {
    const int rows = atoi(arguments[i]);
    std::vector<std::unique_ptr<Sequence>> sequences;
    // Few long ones where there are many.
    for (int row = 0; row < rows; row++)
      sequences.push_back(std::make_unique<Sequence>(positions[(number + row) % (row < 12 ? 12 : 8)]));
    // Highest ranks of 64, of 8, and no adapter at all; each goes on once.
    for (int step = 0; step < 6; step++, number++) {
      std::vector<Row> own;
      for (int row = 0; row < rows; row++) {
        const int adapter = step < 2 ? rows == 1 ? 1 : (i + row) % 5 : step < 4 ? row % 2 * 4 : 4;
        own.push_back({below(VOCAB), sequences[row].get(), adapter < 4 ? &adapters[adapter] : nullptr});
      }
      test.step(own, step % 2);
      for (auto& sequence : sequences) sequence->next();
    }
  }
  Sequence sequence(1);
  test.lost_step(std::vector<Row>(3, {1, &sequence, nullptr}));
  const Adapter broken({8}, NAN);
  for (int rows : {1, 2, 9}) {
    std::vector<std::unique_ptr<Sequence>> sequences;
    std::vector<Row> own;
    for (int row = 0; row < rows; row++) {
      sequences.push_back(std::make_unique<Sequence>(row));
      own.push_back({1, sequences[row].get(), &adapters[0]});
    }
    test.broken_step(own, broken);
  }
  printf("%d launches, logits: mean %.1e most %.1e (bits %016llx), keys and values: mean %.1e most %.1e%s%s%s%s%s\n",
         test.launches, test.logits.mean(), test.logits.most(), test.bits, test.pages.mean(), test.pages.most(),
         test.same ? "" : ", SEEDS DIFFER", test.untouched ? "" : ", WROTE TO OTHER POSITIONS",
         test.refused ? "" : ", WENT ON WITHOUT A PLAN", test.apart ? "" : ", A BROKEN STEP IS FELT BEHIND IT",
         test.good() ? "" : ": FAILED");
  return !test.good();
}
