//! A token for each of some sequences, all layers in one launch of `step.cuh`.

use super::kernel::{Kernel, Launch, Source};
use super::pages::{Addresses, Sequence};
use super::plan::{HEADER, PlanEncoder};
use super::{BARRIERS, NUMBERS, PRIMITIVES, Shape, arrays, multiprocessors, on_card};
use crate::backend::Token;
use crate::error::{Error, Result};
use mlx_rs::{Array, Dtype, ops, transforms};
use std::cell::RefCell;
use std::ffi::CString;

/// As the kernel has them.
pub const MOST_ROWS: usize = 256;
const MOST_SPLITS: usize = 32;
pub const MOST_RANK: usize = 64;
const LOW_RANK_BUFFERS: usize = 4;
const SHARDS: usize = 2;

/// All that a block may have: more than one on a multiprocessor is not wanted.
const SHARED_BYTES: usize = 227 * 1024;

const SOURCES: [&str; 9] = [
    include_str!("step/layout.cuh"),
    include_str!("step/block.cuh"),
    include_str!("step/producers.cuh"),
    include_str!("step/lora.cuh"),
    include_str!("step/shrink_expand.cuh"),
    include_str!("step/epilogue.cuh"),
    include_str!("step/product.cuh"),
    include_str!("step/attention.cuh"),
    include_str!("step/step.cuh"),
];

/// The kernel must fit the block's registers.
const BLOCK: &str = "\n#undef __global__\n\
     #define __global__ __attribute__((global)) __launch_bounds__(ALL_THREADS, 1)\n";

/// The kernel, compiled for so many tiles of eight rows at once.
struct Specialization {
    kernel: Kernel,
    /// `ALL_THREADS`
    threads: usize,
}

impl Specialization {
    fn new(shape: &Shape, tiles: usize) -> Result<Self> {
        let Shape { hidden, inner, heads, kv_heads, dim, layers, vocab, eps, theta, .. } = *shape;
        let numbers = [
            ("TILES", tiles),
            ("HIDDEN", hidden),
            ("INNER", inner),
            ("HEADS", heads),
            ("KV_HEADS", kv_heads),
            ("DIM", dim),
            ("LAYERS", layers),
            ("VOCAB", vocab),
            ("EPS_BITS", eps.to_bits() as usize),
            ("THETA_BITS", theta.to_bits() as usize),
            ("QK_NORM", usize::from(shape.qk_norm)),
            ("QKV_BIAS", usize::from(shape.qkv_bias)),
            ("SCALED", usize::from(shape.scaled)),
        ];
        // MLX knows a kernel by its name.
        let mut name = String::from("bombus_step");
        let mut header = [PRIMITIVES, BARRIERS, NUMBERS].concat();
        for (constant, number) in numbers {
            name.push_str(&format!("_{number}"));
            header.push_str(&format!("constexpr int {constant} = {number};\n"));
        }
        header.extend(SOURCES);
        header.push_str(BLOCK);
        let kernel = Kernel::new(&Source {
            name: &CString::new(name).unwrap_or_default(),
            inputs: &[c"table", c"plan", c"sampled", c"workspace"],
            outputs: &[c"logits"],
            header: &header,
            body: include_str!("step/launch.cu"),
            contiguous: true,
            shared: SHARED_BYTES,
        })?;
        // 16 warps that multiply; with one tile three for epilogues and one producer, else two producers.
        let warps = if tiles == 1 { 20 } else { 18 };
        Ok(Self { kernel, threads: 32 * warps })
    }
}

/// Rows go through the tensor cores by eight: so many at once where there are more.
pub const MOST_IN_A_TILE: usize = 8;
const TILES: usize = 4;

pub struct Step {
    pub shape: Shape,
    one_tile: Specialization,
    tiles: Specialization,
    blocks: usize,
    /// Scales and biases as the kernel wants them.
    _scales_biases: Vec<Array>,
    /// Addresses of all weights, and of the adapters'.
    table: Array,
    workspace: RefCell<Workspace>,
    /// Has the last plan that was sent.
    encoder: RefCell<PlanEncoder>,
    /// In place of samples where there are none.
    no_samples: Array,
}

/// A sequence in a step.
pub struct Row<'a> {
    pub token: Token,
    pub position: usize,
    pub sequence: &'a mut Sequence,
    /// where its adapter's table is, and the highest rank there
    pub adapter: Option<(u64, usize)>,
}

impl Step {
    pub fn new(model: &ModelArrays, shape: Shape, addresses: &Addresses) -> Result<Self> {
        let (table, scales_biases) = table(model, addresses)?;
        Ok(Self {
            one_tile: Specialization::new(&shape, 1)?,
            tiles: Specialization::new(&shape, TILES)?,
            blocks: multiprocessors()?,
            _scales_biases: scales_biases,
            table,
            workspace: RefCell::new(Workspace::new(&shape, 32, 1024)?),
            encoder: RefCell::default(),
            no_samples: Array::from_slice(&[0u32], &[1]),
            shape,
        })
    }

    /// The last plan that was sent may never have reached the card.
    pub fn forget_plan(&self) {
        self.encoder.take();
    }

    /// -> logits `[rows, vocab]` in float32
    pub fn run(&self, rows: &mut [Row], previous: Option<&Array>) -> Result<Array> {
        let count = rows.len();
        let there = previous.map_or(0, |samples| samples.dim(0) as usize);
        if rows.iter().any(|row| matches!(row.token, Token::Sampled(row) if row >= there)) {
            return Err(Error::Backend("a token was not sampled by the step before".into()));
        }
        let mut plan = self.plan(rows)?;
        let mut workspace = self.workspace.borrow_mut();
        if workspace.rows < count || workspace.plan < plan.len() {
            let rows = workspace.rows.max(count.next_power_of_two());
            let words = workspace.plan.max(plan.len().next_power_of_two());
            *workspace = Workspace::new(&self.shape, rows, words)?;
        }
        plan[3] = workspace.bytes as u64;
        let plan = self.encoder.borrow_mut().encode(plan, previous.is_some());
        let plan = Array::from_slice(&plan, &[plan.len() as i32]);
        let specialized = if count <= MOST_IN_A_TILE { &self.one_tile } else { &self.tiles };
        let mut outputs = specialized.kernel.run(&Launch {
            inputs: &[&self.table, &plan, previous.unwrap_or(&self.no_samples), &workspace.array],
            outputs: &[(&[count as i32, self.shape.vocab as i32], Dtype::Float32)],
            blocks: self.blocks as i32,
            threads: specialized.threads as i32,
            constants: &[],
        })?;
        Ok(outputs.swap_remove(0))
    }

    /// How long the phases of the last step took, all layers together; it must have been read.
    pub fn profile(&self) -> Result<Vec<Phase>> {
        let count = stamps(&self.shape);
        let from = STAMPS as i32 / 4;
        let words = arrays::index(&self.workspace.borrow().array, from..from + 2 * count as i32)?;
        let words = words.contiguous()?.view::<u64>()?;
        words.eval()?;
        let stamps = arrays::values::<u64>(&words)?;
        let cycles = &stamps[2..];
        let all = cycles[cycles.len() - 1] - cycles[0];
        let cycle = (stamps[1] - stamps[0]) as f64 * 1e-9 / all as f64;
        let took = |phase: usize| (cycles[phase + 1] - cycles[phase]) as f64 * cycle;
        let layers = self.shape.layers;
        let mut phases = vec![Phase { name: "embedding", seconds: took(0), weights: 0 }];
        for (place, name) in ["qkv", "attention", "o", "gate, up", "down"].into_iter().enumerate() {
            let seconds = (0..layers).map(|layer| took(1 + layer * 5 + place)).sum();
            phases.push(Phase { name, seconds, weights: layers * self.shape.bytes(name) });
        }
        let seconds = took(1 + layers * 5);
        phases.push(Phase { name: "head", seconds, weights: self.shape.bytes("head") });
        Ok(phases)
    }

    /// What `step.cuh` says of `plan`.
    fn plan(&self, rows: &mut [Row]) -> Result<Vec<u64>> {
        let mut pages = 0;
        for row in &mut *rows {
            row.sequence.reserve(row.position..row.position + 1)?;
            pages = pages.max(row.sequence.addresses().len());
        }
        let words = 2 + pages;
        let mut plan = vec![0u64; HEADER + rows.len() * words];
        let mut highest = 0;
        for (row, own) in rows.iter().zip(plan[HEADER..].chunks_exact_mut(words)) {
            let id = match row.token {
                Token::Id(id) => id,
                Token::Sampled(row) => u32::MAX - row as u32,
            };
            own[0] = u64::from(id) | (row.position as u64) << 32;
            if let Some((address, rank)) = row.adapter {
                own[1] = address;
                highest = rank.max(highest);
            }
            own[2..].iter_mut().zip(row.sequence.addresses()).for_each(|(word, page)| *word = page);
        }
        plan[..3].copy_from_slice(&[rows.len() as u64, words as u64, highest as u64]);
        Ok(plan)
    }
}

/// Codes `[out, in / 8]`, scales and biases `[out, in / 64]` of a weight in 4 bits.
pub type MatrixArrays<'a> = [&'a Array; 3];

/// A layer's weights.
pub struct LayerArrays<'a> {
    pub qkv: MatrixArrays<'a>,
    pub o: MatrixArrays<'a>,
    pub gate_up: MatrixArrays<'a>,
    pub down: MatrixArrays<'a>,
    pub input_norm: &'a Array,
    pub post_norm: &'a Array,
    /// of heads of q and k
    pub head_norms: Option<&'a [Array; 2]>,
    /// of q, k and v
    pub bias: Option<&'a Array>,
}

/// A model's weights.
pub struct ModelArrays<'a> {
    pub layers: Vec<LayerArrays<'a>>,
    pub head: MatrixArrays<'a>,
    pub norm: &'a Array,
    pub embedding: MatrixArrays<'a>,
    /// As `angle_of` of `numbers.cuh` takes it.
    pub rotation: &'a Array,
}

/// The addresses of all weights, in the order of the kernel, and what was made of some of them.
fn table(model: &ModelArrays, addresses: &Addresses) -> Result<(Array, Vec<Array>)> {
    let (mut words, mut made) = (vec![], vec![]);
    let mut matrix = |matrix: MatrixArrays, swiglu: bool, words: &mut Vec<Array>| -> Result<()> {
        let [codes, scales, biases] = matrix;
        let swizzled = swizzled(scales, biases, swiglu)?;
        words.extend([addresses.of(codes)?, addresses.of(&swizzled)?]);
        made.push(swizzled);
        Ok(())
    };
    for layer in &model.layers {
        matrix(layer.qkv, false, &mut words)?;
        matrix(layer.o, false, &mut words)?;
        matrix(layer.gate_up, true, &mut words)?;
        matrix(layer.down, false, &mut words)?;
        let [q_norm, k_norm] = layer.head_norms.map_or([None; 2], |[q, k]| [Some(q), Some(k)]);
        let norms = [Some(layer.input_norm), Some(layer.post_norm), q_norm, k_norm];
        for array in norms.into_iter().chain([layer.bias]) {
            words.push(match array {
                Some(array) => addresses.of(array)?,
                None => Array::from_slice(&[0u64], &[1]),
            });
        }
    }
    matrix(model.head, false, &mut words)?;
    for array in [model.norm].into_iter().chain(model.embedding).chain([model.rotation]) {
        words.push(addresses.of(array)?);
    }
    let table = ops::concatenate(&words, 0)?;
    transforms::eval([&table])?;
    Ok((table, made))
}

/// Scales and biases `[out, in / 64]` as `Matrix` of the kernel has them: 16 outputs by 4 groups, of gate
/// and up eight outputs each, alternately; at the end there may be more outputs and groups.
fn swizzled(scales: &Array, biases: &Array, swiglu: bool) -> Result<Array> {
    let (outputs, groups) = (scales.dim(0), scales.dim(1));
    let words = |x: &Array| x.view::<u16>().and_then(|words| words.as_dtype(Dtype::Uint32));
    let high = Array::from_slice(&[1u32 << 16], &[1]);
    let mut both = words(scales)?.add(words(biases)?.multiply(high)?)?;
    if swiglu {
        both = both.reshape(&[2, outputs / 16, 8, groups])?.transpose_axes(&[1, 0, 2, 3])?;
        both = both.reshape(&[outputs, groups])?;
    }
    let (tiles, quads) = ((outputs + 63) / 64 * 4, (groups + 3) / 4);
    let more = [(0, tiles * 16 - outputs), (0, quads * 4 - groups)];
    let both = ops::pad(&both, &more, None, None)?;
    let both = both.reshape(&[tiles, 16, quads, 4])?.transpose_axes(&[0, 2, 1, 3])?;
    on_card(&both.flatten(None, None)?)
}

/// A phase of a step.
pub struct Phase {
    pub name: &'static str,
    pub seconds: f64,
    /// The bytes of its weights.
    pub weights: usize,
}

/// Where the kernel notes its phases: bytes.
const STAMPS: usize = 256;

/// The numbers that the kernel notes of its phases.
fn stamps(shape: &Shape) -> usize {
    5 * shape.layers + 5
}

/// What lies between the phases, as `Step` of the kernel divides it, and behind that a copy of the plan.
struct Workspace {
    array: Array,
    /// It has room for so many rows, and words of a plan.
    rows: usize,
    plan: usize,
    /// Without the plan.
    bytes: usize,
}

impl Workspace {
    fn new(shape: &Shape, rows: usize, plan: usize) -> Result<Self> {
        let Shape { hidden, inner, heads, kv_heads, dim, .. } = *shape;
        let fixed = [
            STAMPS,
            8 * stamps(shape),
            4 * MOST_ROWS * kv_heads,
            4 * MOST_ROWS * hidden,
            4 * MOST_ROWS * (hidden / 16),
            4 * MOST_ROWS * shape.qkv_width(),
            2 * MOST_ROWS * hidden,
            2 * MOST_ROWS * heads * dim,
            2 * MOST_ROWS * inner,
            8 * LOW_RANK_BUFFERS * SHARDS * MOST_ROWS * 3 * MOST_RANK,
            4 * MOST_ROWS * dim,
            // splits
            4 * rows * MOST_SPLITS * heads * (dim + 2),
        ];
        let bytes = fixed.into_iter().map(|bytes| bytes.next_multiple_of(256)).sum::<usize>();
        let array = ops::zeros::<u32>(&[(bytes / 4 + plan * 2) as i32])?;
        transforms::eval([&array])?;
        Ok(Self { array, rows, plan, bytes })
    }
}

impl Shape {
    /// The weights of a phase, in 4 bits with 16 bits of scale and of bias for every 64.
    fn bytes(&self, phase: &str) -> usize {
        let numbers = match phase {
            "qkv" => self.hidden * self.qkv_width(),
            "o" => self.hidden * self.heads * self.dim,
            "gate, up" => self.hidden * 2 * self.inner,
            "down" => self.inner * self.hidden,
            "head" => self.hidden * self.vocab,
            _ => 0,
        };
        numbers / 2 + numbers / 16
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_and_biases_lie_by_sixteen_outputs_and_four_groups() {
        arrays::tests::on_cpu(|| {
            for (outputs, groups, swiglu) in [(96, 5, false), (200, 4, false), (64, 6, true)] {
                let number = |output: usize, group: usize| (output * groups + group) as u16;
                let all = || {
                    (0..outputs).flat_map(|output| (0..groups).map(move |group| (output, group)))
                };
                let numbers = |more: u16| {
                    let numbers: Vec<u16> = all().map(|(o, g)| number(o, g) + more).collect();
                    let numbers = Array::from_slice(&numbers, &[outputs as i32, groups as i32]);
                    numbers.view::<half::bf16>().unwrap()
                };
                let swizzled = swizzled(&numbers(0), &numbers(2000), swiglu).unwrap();
                let swizzled = arrays::values::<u32>(&swizzled).unwrap();
                let quads = groups.div_ceil(4);
                assert_eq!(swizzled.len(), outputs.next_multiple_of(64) * quads * 4);
                for (output, group) in all() {
                    // Of 16 rows of a tile, eight are gate's and eight are up's.
                    let half = outputs / 2;
                    let (tile, row) = match (swiglu, output < half) {
                        (false, _) => (output / 16, output % 16),
                        (true, true) => (output / 8, output % 8),
                        (true, false) => ((output - half) / 8, 8 + (output - half) % 8),
                    };
                    let word = swizzled[((tile * quads + group / 4) * 16 + row) * 4 + group % 4];
                    let number = u32::from(number(output, group));
                    assert_eq!(word, number | (number + 2000) << 16, "{output} {group} {swiglu}");
                }
            }
        });
    }
}
