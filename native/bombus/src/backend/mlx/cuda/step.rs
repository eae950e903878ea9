//! A token for each of some sequences, all layers in one launch of `step.cu`.

use super::kernel::{Kernel, Launch, Source};
use super::lora::Tables;
use super::pages::{Addresses, Sequence};
use super::{Mlx, NUMBERS, PRIMITIVES, Shape, array, multiprocessors};
use crate::backend::Token;
use crate::decoder::{BoundAdapter, Decoder};
use crate::error::Result;
use mlx_rs::ops::indexing::TryIndexOp;
use mlx_rs::{Array, Dtype, ops, transforms};
use std::cell::RefCell;
use std::rc::Rc;

const THREADS: usize = 512;
/// As the kernel has them.
pub const MOST_ROWS: usize = 256;
const MOST_SPLITS: usize = 32;
/// Rows go through the tensor cores by eight: so many at once where there are more.
pub const MOST_IN_A_TILE: usize = 8;
const TILES: usize = 4;
pub const MOST_RANK: usize = 64;
const HEADER: usize = 4;
const STAGES: usize = 4;
const STAGE_BYTES: usize = 38_912;

/// The kernel is compiled for each: it must fit the block's registers.
const BLOCK: &str = "\n#undef __global__\n\
     #define __global__ __attribute__((global)) __launch_bounds__(THREADS, 1)\n";

pub struct Step {
    pub shape: Shape,
    kernel: Kernel,
    blocks: usize,
    /// Addresses of all weights, and of the adapters'.
    table: Array,
    tables: Tables,
    workspace: RefCell<Workspace>,
    /// In place of samples where there are none.
    no_samples: Array,
}

/// A sequence in a step.
pub struct Row<'a> {
    pub token: Token,
    pub position: usize,
    pub sequence: &'a mut Sequence,
    pub adapter: Option<&'a BoundAdapter<Mlx>>,
}

impl Step {
    pub fn new(decoder: &Decoder<Mlx>, shape: Shape, addresses: Rc<Addresses>) -> Result<Self> {
        let kernel = Kernel::new(&Source {
            name: c"bombus_step",
            inputs: &[c"table", c"plan", c"sampled", c"workspace"],
            outputs: &[c"logits"],
            header: &[PRIMITIVES, NUMBERS, include_str!("step.cuh"), BLOCK].concat(),
            body: include_str!("step.cu"),
            contiguous: true,
            shared: shape.shared_bytes(),
        })?;
        Ok(Self {
            kernel,
            blocks: multiprocessors()?,
            table: table(decoder, &addresses)?,
            tables: Tables::new(addresses),
            workspace: RefCell::new(Workspace::new(&shape, 32, 1024)?),
            no_samples: Array::from_slice(&[0u32], &[1]),
            shape,
        })
    }

    /// Whether the kernel serves a sequence with this adapter.
    pub fn serves(&self, adapter: Option<&BoundAdapter<Mlx>>) -> Result<bool> {
        Ok(match adapter {
            Some(adapter) => self.tables.of(adapter)?.is_some(),
            None => true,
        })
    }

    /// -> logits `[rows, vocab]` in float32
    pub fn run(&self, rows: &mut [Row], previous: Option<&Array>) -> Result<Array> {
        let count = rows.len();
        let mut plan = self.plan(rows)?;
        let mut workspace = self.workspace.borrow_mut();
        if workspace.rows < count || workspace.plan < plan.len() {
            let rows = workspace.rows.max(count.next_power_of_two());
            let words = workspace.plan.max(plan.len().next_power_of_two());
            *workspace = Workspace::new(&self.shape, rows, words)?;
        }
        plan[3] = workspace.bytes as u64;
        let plan = Array::from_slice(&plan, &[plan.len() as i32]);
        let shape = &self.shape;
        let tiles = if count <= MOST_IN_A_TILE { 1 } else { TILES };
        let mut outputs = self.kernel.run(&Launch {
            inputs: &[&self.table, &plan, previous.unwrap_or(&self.no_samples), &workspace.array],
            outputs: &[(&[count as i32, shape.vocab as i32], Dtype::Float32)],
            blocks: self.blocks as i32,
            threads: THREADS as i32,
            constants: &[
                (c"TILES", tiles as i32),
                (c"HIDDEN", shape.hidden as i32),
                (c"INNER", shape.inner as i32),
                (c"HEADS", shape.heads as i32),
                (c"KV_HEADS", shape.kv_heads as i32),
                (c"DIM", shape.dim as i32),
                (c"LAYERS", shape.layers as i32),
                (c"VOCAB", shape.vocab as i32),
                (c"EPS_BITS", shape.eps.to_bits() as i32),
                (c"THETA_BITS", shape.theta.to_bits() as i32),
            ],
        })?;
        Ok(outputs.swap_remove(0))
    }

    /// How long the phases of the last step took, all layers together; it must have been read.
    pub fn profile(&self) -> Result<Vec<Phase>> {
        let count = stamps(&self.shape);
        let from = STAMPS as i32 / 4;
        let words = self.workspace.borrow().array.try_index(from..from + 2 * count as i32)?;
        let words = words.contiguous()?.view::<u64>()?;
        words.eval()?;
        let stamps = array::values::<u64>(&words)?;
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
            if let Some(adapter) = row.adapter
                && let Some((address, rank)) = self.tables.of(adapter)?
            {
                own[1] = address;
                highest = rank.max(highest);
            }
            own[2..].iter_mut().zip(row.sequence.addresses()).for_each(|(word, page)| *word = page);
        }
        plan[..3].copy_from_slice(&[rows.len() as u64, words as u64, highest as u64]);
        Ok(plan)
    }
}

/// The addresses of all weights, in the order of the kernel.
fn table(decoder: &Decoder<Mlx>, addresses: &Addresses) -> Result<Array> {
    let mut arrays: Vec<&Array> = vec![];
    for layer in &decoder.layers {
        for linear in [&layer.qkv_proj, &layer.o_proj, &layer.gate_up_proj, &layer.down_proj] {
            arrays.extend(linear.matrix().iter().flat_map(|matrix| matrix.arrays));
        }
        arrays.extend([&layer.input_layernorm, &layer.post_attention_layernorm]);
        arrays.extend([&layer.q_norm, &layer.k_norm]);
    }
    let head = decoder.lm_head.as_ref().unwrap_or(&decoder.embed_tokens);
    arrays.extend(head.matrix().iter().flat_map(|matrix| matrix.arrays));
    arrays.push(&decoder.norm);
    arrays.extend(decoder.embed_tokens.matrix().iter().flat_map(|matrix| matrix.arrays));
    let addresses = arrays.into_iter().map(|array| addresses.of(array));
    let table = ops::concatenate(&addresses.collect::<Result<Vec<_>>>()?, 0)?;
    transforms::eval([&table])?;
    Ok(table)
}

/// A part of a step.
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
            4 * MOST_ROWS * 3 * MOST_RANK,
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

    /// The larger of the warps' sums and the teams' memory (`Step::Team`), behind what is always there.
    fn shared_bytes(&self) -> usize {
        let (shared, dim) = (self.heads / self.kv_heads, self.dim);
        let heads = shared.min(4);
        let floats = shared * dim + dim + heads * 64 + 3 * heads + 4 * heads * dim + 4;
        let team = (4 * floats).next_multiple_of(16);
        // Of eight tiles: those of many rows, two high.
        let sums = (THREADS / 32) * 2 * TILES * 128 * 4;
        4 * (3 * MOST_ROWS + 4) + STAGES * STAGE_BYTES + sums.max(team * THREADS / 128)
    }
}
