//! What Rust and the fused kernel both know: constants, the model's table, a plan, the workspace.
//!
//! It stands here once. `header` prints it as C++, and that text comes before `step/layout.cuh`; the
//! emulated kernel (`tests/cuda/run.sh`) compiles this very file and prints the same. So this module
//! uses nothing but `std`.

/// What the kernels are compiled for.
#[derive(Clone, Copy)]
pub struct Shape {
    pub hidden: usize,
    pub inner: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
    pub layers: usize,
    pub vocab: usize,
    pub eps: f32,
    pub theta: f32,
    /// of heads of q and k
    pub qk_norm: bool,
    pub qkv_bias: bool,
    pub o_bias: bool,
    /// of gate, up and down
    pub mlp_bias: bool,
    /// Whether frequencies are others than theta's own.
    pub scaled: bool,
    /// Tables of frequencies: one, or two that layers choose from.
    pub rotations: usize,
    /// Whether there are layers whose heads are not rotated.
    pub unrotated: bool,
    /// The positions that a row of a windowed layer sees, with its own; 0 where there are none.
    pub window: usize,
    /// Queries are multiplied by `1 + beta ln(1 + floor(position / context))`.
    pub query_beta: f32,
    pub query_context: usize,
    /// The MLP's gate has GELU, not SiLU.
    pub gelu: bool,
    /// What attention and MLP add is normed.
    pub post_norms: bool,
    pub factors: Factors,
}

/// What layers of one model differ in.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LayerKind {
    /// Its heads are not rotated.
    pub unrotated: bool,
    /// Its rows see no more than the model's window.
    pub windowed: bool,
    /// Which of the model's rotations it has.
    pub rotation: usize,
}

impl LayerKind {
    /// Its word in the model's table.
    pub fn flags(self) -> usize {
        usize::from(self.unrotated) * UNROTATED
            + usize::from(self.windowed) * WINDOWED
            + self.rotation * SECOND_ROTATION
    }
}

/// What a model multiplies by numbers of its own.
#[derive(Clone, Copy)]
pub struct Factors {
    pub embedding: f32,
    /// of what attention and MLP add to the residual stream
    pub residual: f32,
    pub logits: f32,
    /// of scores, where it is not `dim^-0.5`
    pub scores: Option<f32>,
}

impl Factors {
    pub const NONE: Self = Self { embedding: 1.0, residual: 1.0, logits: 1.0, scores: None };
}

/// Defines constants, and lists them for `header`.
macro_rules! constants {
    ($($(#[$doc:meta])* $name:ident = $value:expr;)*) => {
        $($(#[$doc])* pub const $name: usize = $value;)*
        const CONSTANTS: &[(&str, usize)] = &[$((stringify!($name), $name)),*];
    };
}

constants! {
    /// of a step
    MOST_ROWS = 256;
    /// of a row's attention to one head of keys
    MOST_SPLITS = 32;
    /// of a LoRA, a multiple of 8
    MOST_RANK = 64;
    /// Rows that a tensor core takes at once.
    TILE_ROWS = 8;
    /// so many where there are more rows than one has
    MOST_TILES = 4;

    /// Warps of a block that multiply; with one tile others run the epilogue. More than 20 in all
    /// would have fewer registers.
    WARPS = 16;
    EPILOGUE_WARPS_OF_ONE_TILE = 3;
    /// Warps that bring weights, and with more tiles inputs.
    PRODUCERS_OF_ONE_TILE = 1;
    PRODUCERS_OF_TILES = 2;
    /// All that a block may have: more than one on a multiprocessor is not wanted.
    SHARED_LIMIT = 227 * 1024;

    /// x a^T is added up in so many buffers, which products rotate through: a power of 2.
    LOW_RANK_BUFFERS = 4;
    /// of each row in a buffer: powers of 2
    SHARDS = 2;
    SHARDS_OF_ONE_ROW = 8;

    /// Positions in a page of keys and values.
    PAGE_POSITIONS = 64;

    // A plan: words before those of the rows (their number, words of a row, highest rank, where the
    // workspace has room for a copy), and the words of a row before its pages (id and position,
    // adapter).
    HEADER = 4;
    ROW_WORDS = 2;
    /// In the first word, where the step goes on as the last one did.
    GOES_ON = 1 << 31;

    // The model's table: addresses of each layer (0 for what it has not), of a matrix codes, then
    // scales and biases.
    QKV = 0;
    O = 2;
    GATE_UP = 4;
    DOWN = 6;
    INPUT_NORM = 8;
    POST_NORM = 9;
    Q_NORM = 10;
    K_NORM = 11;
    BIAS_OF_QKV = 12;
    /// no address: those of the layer's `LayerKind`
    FLAGS = 13;
    BIAS_OF_O = 14;
    BIAS_OF_GATE_UP = 15;
    BIAS_OF_DOWN = 16;
    /// Norms of what attention and MLP add.
    AFTER_ATTENTION = 17;
    AFTER_MLP = 18;
    LAYER_WORDS = 19;
    // Behind all layers; of the embedding codes, scales and biases as they lie in the checkpoint.
    HEAD = 0;
    NORM = 2;
    EMBEDDING = 3;
    ROTATION = 6;
    MODEL_WORDS = 7;

    // Flags of a layer.
    UNROTATED = 1;
    WINDOWED = 2;
    SECOND_ROTATION = 4;

    // An adapter's table: A, B, rank and scale of each linear layer.
    LORA_QKV = 0;
    LORA_O = 3;
    LORA_GATE_UP = 4;
    LORA_DOWN = 6;
    LORA_LAYERS = 7;
    LORA_WORDS = 3;

    /// When it began and ended, in nanoseconds and in cycles, and the end of the embedding.
    OTHER_STAMPS = 5;
}

/// The threads of a block.
pub const fn threads(tiles: usize) -> usize {
    let others = match tiles {
        1 => EPILOGUE_WARPS_OF_ONE_TILE + PRODUCERS_OF_ONE_TILE,
        _ => PRODUCERS_OF_TILES,
    };
    32 * (WARPS + others)
}

/// Areas of the workspace begin at multiples of so many bytes.
const ALIGNMENT: usize = 256;

impl Shape {
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.dim
    }

    /// Times that the kernel notes.
    pub fn stamps(&self) -> usize {
        self.phases().len() * self.layers + OTHER_STAMPS
    }

    /// The phases of a layer, in order; the kernel notes when each ended.
    pub fn phases(&self) -> &'static [&'static str] {
        match self.post_norms {
            false => &["qkv", "attention", "o", "gate, up", "down"],
            true => &["qkv", "attention", "o", "norm of o", "gate, up", "down", "norm of down"],
        }
    }

    /// What attention finds in a split for one head: values, the largest score, the sum.
    fn partial(&self) -> usize {
        self.dim + 2
    }

    /// The areas of the workspace but for the last, which is `SPLITS`: bytes of each, in order.
    fn areas(&self) -> [(&'static str, usize); 13] {
        let normed_after = usize::from(self.post_norms);
        [
            ("COUNTERS", ALIGNMENT),
            ("STAMPS", 8 * self.stamps()),
            ("ATTENDED", 4 * MOST_ROWS * self.kv_heads),
            ("HIDDEN_AT", 4 * MOST_ROWS * self.hidden),
            ("SQUARES", 4 * MOST_ROWS * (self.hidden / 16)),
            ("QKV_AT", 4 * MOST_ROWS * self.qkv_width()),
            ("NORMED", 2 * MOST_ROWS * self.hidden),
            ("MIXED", 2 * MOST_ROWS * self.heads * self.dim),
            ("ACTIVE", 2 * MOST_ROWS * self.inner),
            ("LOW_RANK", 8 * LOW_RANK_BUFFERS * SHARDS * MOST_ROWS * 3 * MOST_RANK),
            ("ANGLES", 4 * MOST_ROWS * self.dim * self.rotations),
            ("BRANCH", 4 * MOST_ROWS * self.hidden * normed_after),
            ("BRANCH_SQUARES", 4 * MOST_ROWS * (self.hidden / 16) * normed_after),
        ]
    }

    /// Where an area begins.
    pub fn area(&self, name: &str) -> usize {
        let before = self.areas().into_iter().take_while(|(other, _)| *other != name);
        before.map(|(_, bytes)| bytes.next_multiple_of(ALIGNMENT)).sum()
    }

    /// The bytes of a workspace with room for the splits of so many rows, without a plan's copy.
    pub fn workspace(&self, rows: usize) -> usize {
        let splits = 4 * rows * MOST_SPLITS * self.heads * self.partial();
        self.area("SPLITS") + splits.next_multiple_of(ALIGNMENT)
    }

    /// The model's numbers, as the kernel has them.
    pub fn constants(&self) -> [(&'static str, usize); 25] {
        [
            ("HIDDEN", self.hidden),
            ("INNER", self.inner),
            ("HEADS", self.heads),
            ("KV_HEADS", self.kv_heads),
            ("DIM", self.dim),
            ("LAYERS", self.layers),
            ("VOCAB", self.vocab),
            ("EPS_BITS", self.eps.to_bits() as usize),
            ("THETA_BITS", self.theta.to_bits() as usize),
            ("QK_NORM", usize::from(self.qk_norm)),
            ("QKV_BIAS", usize::from(self.qkv_bias)),
            ("RESIDUAL_BIAS", usize::from(self.o_bias || self.mlp_bias)),
            ("GATE_UP_BIAS", usize::from(self.mlp_bias)),
            ("SCALED", usize::from(self.scaled)),
            ("ROTATIONS", self.rotations),
            ("SOME_UNROTATED", usize::from(self.unrotated)),
            ("WINDOW", self.window),
            ("QUERY_BETA_BITS", self.query_beta.to_bits() as usize),
            ("QUERY_CONTEXT", self.query_context),
            ("GELU", usize::from(self.gelu)),
            ("POST_NORMS", usize::from(self.post_norms)),
            ("EMBEDDING_FACTOR_BITS", self.factors.embedding.to_bits() as usize),
            ("RESIDUAL_FACTOR_BITS", self.factors.residual.to_bits() as usize),
            ("LOGITS_FACTOR_BITS", self.factors.logits.to_bits() as usize),
            ("SCORE_FACTOR_BITS", self.factors.scores.map_or(0, f32::to_bits) as usize),
        ]
    }
}

/// C++ that defines all of this for a model.
pub fn header(shape: &Shape) -> String {
    let shared = CONSTANTS.iter().copied().chain([("PARTIAL", shape.partial())]);
    let constants = shape.constants().into_iter().chain(shared).map(|(name, value)| {
        let kind = if value < GOES_ON { "int" } else { "unsigned" };
        format!("constexpr {kind} {name} = {value};\n")
    });
    let names = shape.areas().map(|(name, _)| name).into_iter().chain(["SPLITS"]);
    let areas = names.map(|name| format!("constexpr size_t {name} = {};\n", shape.area(name)));
    constants.chain(areas).collect()
}
