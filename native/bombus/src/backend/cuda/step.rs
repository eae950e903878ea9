//! A token for each of some sequences, all layers in one launch of `step.cuh`.

use super::kernel::{Kernel, Launch, Source};
use super::layout::{
    self, HEADER, LayerKind, MOST_TILES, ROW_WORDS, SHARED_LIMIT, Shape, TILE_ROWS,
};
use super::pages::{Addresses, Sequence};
use super::plan::PlanEncoder;
use super::{BARRIERS, NUMBERS, PRIMITIVES, arrays, multiprocessors, on_card};
use crate::backend::Token;
use crate::error::{Error, Result};
use mlx_rs::{Array, Dtype, ops, transforms};
use std::cell::RefCell;
use std::ffi::CString;

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
        // MLX knows a kernel by its name.
        let mut name = format!("bombus_step_{tiles}");
        for (_, number) in shape.constants() {
            name.push_str(&format!("_{number}"));
        }
        let mut header = [PRIMITIVES, BARRIERS, NUMBERS].concat();
        header.push_str(&format!("constexpr int TILES = {tiles};\n"));
        header.push_str(&layout::header(shape));
        header.extend(SOURCES);
        header.push_str(BLOCK);
        let kernel = Kernel::new(&Source {
            name: &CString::new(name).unwrap_or_default(),
            inputs: &[c"table", c"plan", c"sampled", c"workspace"],
            outputs: &[c"logits"],
            header: &header,
            body: include_str!("step/launch.cu"),
            contiguous: true,
            shared: SHARED_LIMIT,
        })?;
        Ok(Self { kernel, threads: layout::threads(tiles) })
    }
}

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
            tiles: Specialization::new(&shape, MOST_TILES)?,
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
        let specialized = if count <= TILE_ROWS { &self.one_tile } else { &self.tiles };
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
        let count = self.shape.stamps();
        let from = self.shape.area("STAMPS") as i32 / 4;
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
        let names = self.shape.phases();
        for (place, name) in names.iter().enumerate() {
            let seconds = (0..layers).map(|layer| took(1 + layer * names.len() + place)).sum();
            phases.push(Phase { name, seconds, weights: layers * self.shape.bytes(name) });
        }
        let seconds = took(1 + layers * names.len());
        phases.push(Phase { name: "head", seconds, weights: self.shape.bytes("head") });
        Ok(phases)
    }

    /// What `step.cuh` says of `plan`.
    fn plan(&self, rows: &mut [Row]) -> Result<Vec<u64>> {
        let mut pages = 0;
        for row in &mut *rows {
            row.sequence.reserve(row.position..row.position + 1)?;
            pages = pages.max(row.sequence.addresses().count());
        }
        let words = ROW_WORDS + pages;
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
            own[ROW_WORDS..]
                .iter_mut()
                .zip(row.sequence.addresses())
                .for_each(|(word, page)| *word = page);
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
    /// of what attention and MLP add
    pub after: [Option<&'a Array>; 2],
    /// of heads of q and k
    pub head_norms: Option<&'a [Array; 2]>,
    /// of q, k and v together, o, gate and up together, down
    pub biases: [Option<&'a Array>; 4],
    pub kind: LayerKind,
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

/// The addresses of all weights, each at its word, and what was made of some of them.
fn table(model: &ModelArrays, addresses: &Addresses) -> Result<(Array, Vec<Array>)> {
    let layers = model.layers.len();
    let none = Array::from_slice(&[0u64], &[1]);
    let mut words = vec![none; layers * layout::LAYER_WORDS + layout::MODEL_WORDS];
    let mut made = vec![];
    let mut matrix = |word: usize, matrix: MatrixArrays, swiglu: bool| -> Result<_> {
        let [codes, scales, biases] = matrix;
        let scales_biases = swizzled(scales, biases, swiglu)?;
        let own = [addresses.of(codes)?, addresses.of(&scales_biases)?];
        made.push(scales_biases);
        Ok(own.into_iter().enumerate().map(move |(index, address)| (word + index, address)))
    };
    for (index, layer) in model.layers.iter().enumerate() {
        let own = &mut words[index * layout::LAYER_WORDS..][..layout::LAYER_WORDS];
        let matrices = [
            (layout::QKV, layer.qkv, false),
            (layout::O, layer.o, false),
            (layout::GATE_UP, layer.gate_up, true),
            (layout::DOWN, layer.down, false),
        ];
        for (word, arrays, swiglu) in matrices {
            matrix(word, arrays, swiglu)?.for_each(|(word, address)| own[word] = address);
        }
        let [q_norm, k_norm] = layer.head_norms.map_or([None; 2], |[q, k]| [Some(q), Some(k)]);
        let arrays = [
            (layout::INPUT_NORM, Some(layer.input_norm)),
            (layout::POST_NORM, Some(layer.post_norm)),
            (layout::Q_NORM, q_norm),
            (layout::K_NORM, k_norm),
            (layout::AFTER_ATTENTION, layer.after[0]),
            (layout::AFTER_MLP, layer.after[1]),
        ];
        let biases =
            [layout::BIAS_OF_QKV, layout::BIAS_OF_O, layout::BIAS_OF_GATE_UP, layout::BIAS_OF_DOWN];
        for (word, array) in arrays.into_iter().chain(biases.into_iter().zip(layer.biases)) {
            if let Some(array) = array {
                own[word] = addresses.of(array)?;
            }
        }
        own[layout::FLAGS] = Array::from_slice(&[layer.kind.flags() as u64], &[1]);
    }
    let own = &mut words[layers * layout::LAYER_WORDS..];
    matrix(layout::HEAD, model.head, false)?.for_each(|(word, address)| own[word] = address);
    own[layout::NORM] = addresses.of(model.norm)?;
    own[layout::ROTATION] = addresses.of(model.rotation)?;
    for (index, array) in model.embedding.into_iter().enumerate() {
        own[layout::EMBEDDING + index] = addresses.of(array)?;
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

/// What lies between the phases, as `Shape::areas` divides it, and behind that a copy of the plan.
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
        let bytes = shape.workspace(rows);
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
