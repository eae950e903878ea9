//! What an NVIDIA card alone has: kernels of our own (`step/`: a token for each of many sequences in
//! one launch), and pages of keys and values for them.
//!
//! They serve models in 4 bits, groups of 64 and bfloat16; all others, and steps that the kernels are not
//! made for, take MLX's own operations.

pub mod few_rows;
mod kernel;
mod lora;
pub mod operations;
mod pages;
mod plan;
mod step;
mod turns;

pub use lora::Packed;
pub use pages::Sequence;
pub use step::Phase;
pub use turns::Turn;

use super::attention::Attention;
use super::linear::Matrix;
use super::{Cache, Mlx, Segment, Token, array, device};
use crate::decoder::{Decoder, Part};
use crate::error::{Error, Result};
use crate::spec::{AttentionSpec, Rope, Scaling};
use kernel::{Kernel, Launch, Source};
use mlx_rs::{Array, Dtype, Stream, ops, transforms};
use pages::{Addresses, POSITIONS, Pool};
use std::cell::RefCell;
use std::collections::HashSet;
use std::rc::Rc;
use step::{MOST_IN_A_TILE, MOST_ROWS, Row, Step};

const PRIMITIVES: &str = include_str!("primitives.cuh");
const BARRIERS: &str = include_str!("barriers.cuh");
const NUMBERS: &str = include_str!("numbers.cuh");

/// A model's kernels, and what they need of it.
pub struct Card {
    step: Step,
    append: Kernel,
    attend: Kernel,
    pool: Rc<Pool>,
    /// Numbers of layers, each on the card.
    layers: Vec<Array>,
    /// Radians a position of every pair of a head, and what the head is multiplied by.
    rotation: Array,
    /// For the step that is being made.
    turn: RefCell<Option<Turn>>,
}

/// What the kernels are compiled for.
pub struct Shape {
    hidden: usize,
    inner: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    layers: usize,
    vocab: usize,
    eps: f32,
    theta: f32,
    /// of heads of q and k
    qk_norm: bool,
    qkv_bias: bool,
    /// Whether frequencies are others than theta's own.
    scaled: bool,
}

impl Card {
    /// None where the kernels are not made for this model, or do not work on this card.
    pub fn new(decoder: &Decoder<Mlx>) -> Result<Option<Self>> {
        let Some(shape) = Shape::of(decoder) else { return Ok(None) };
        let addresses = Rc::new(Addresses::new()?);
        let page_bytes = shape.layers * 2 * shape.kv_heads * POSITIONS * shape.dim * 2;
        let pool = Pool::new(addresses.clone(), page_bytes)?;
        let append = Kernel::new(&Source {
            name: c"bombus_append",
            inputs: &[c"q", c"k", c"v", c"q_norm", c"k_norm", c"plan", c"layer", c"rotation"],
            outputs: &[c"queries", c"keys", c"values"],
            header: &[PRIMITIVES, NUMBERS].concat(),
            body: include_str!("append.cu"),
            contiguous: false,
            shared: 0,
        })?;
        // A tile of 64 keys and one of values, twice; rows have 16 bytes more.
        let shared = 4 * 64 * (shape.dim * 2 + 16);
        let attend = Kernel::new(&Source {
            name: c"bombus_attend",
            inputs: &[c"q", c"k", c"v"],
            outputs: &[c"y"],
            header: &[PRIMITIVES, NUMBERS].concat(),
            body: include_str!("attend.cu"),
            contiguous: true,
            shared,
        })?;
        let layers = (0..shape.layers).map(|layer| on_card(&array::indices(&[layer])));
        let layers = layers.collect::<Result<_>>()?;
        let rotation = on_card(&rotation(&decoder.spec.layers[0].attention.rope))?;
        let step = Step::new(decoder, shape, addresses, &rotation)?;
        let card = Self { step, append, attend, pool, layers, rotation, turn: RefCell::default() };
        Ok(card.works(decoder)?.then_some(card))
    }

    /// Tries each of the kernel's forms (which also compiles them), beside MLX's own operations.
    fn works(&self, decoder: &Decoder<Mlx>) -> Result<bool> {
        let logits = |caches: &mut [Cache], own: bool| {
            let tokens = vec![Token::Id(1); caches.len()];
            let parts = caches.iter_mut().enumerate().map(|(row, cache)| Part {
                segment: Segment { rows: row..row + 1, start: 0 },
                cache,
                adapter: None,
            });
            let mut parts: Vec<_> = parts.collect();
            match own {
                true => self.take_step(&tokens, None, &mut parts),
                false => decoder.through_layers(&tokens, None, &mut parts, &[0]),
            }
        };
        let theirs = logits(&mut [decoder.kv_cache()], false)?.as_dtype(Dtype::Float32)?;
        let size = theirs.abs()?.mean(false)?;
        for rows in [1, MOST_IN_A_TILE + 1] {
            let mut caches: Vec<_> = (0..rows).map(|_| Cache::Paged(self.sequence())).collect();
            let own = logits(&mut caches, true)?;
            let off = own.subtract(&theirs)?.abs()?.mean(false)?;
            // MLX rounds to bfloat16 between layers, the kernel does not.
            let close = off.lt(size.multiply(Array::from_f32(0.1))?)?;
            close.eval()?;
            drop(self.turn());
            if !array::values::<bool>(&close)?[0] {
                return Ok(false);
            }
        }
        Ok(true)
    }

    pub fn sequence(&self) -> Sequence {
        Sequence::new(&self.pool)
    }

    pub fn step(&self) -> &Step {
        &self.step
    }

    /// As `Backend::step`; more rows than the kernel takes go in several launches.
    pub fn take_step(
        &self,
        tokens: &[Token],
        previous: Option<&Array>,
        parts: &mut [Part<Mlx>],
    ) -> Result<Array> {
        let mut rows = vec![];
        for (token, part) in tokens.iter().zip(parts) {
            let Cache::Paged(sequence) = &mut *part.cache else {
                return Err(Error::Backend("a cache without pages".into()));
            };
            let (position, adapter) = (part.segment.start, part.adapter);
            rows.push(Row { token: *token, position, sequence, adapter });
        }
        let finish = || device::synchronize(&Stream::thread_local_or_default());
        let turn = turns::take(std::ptr::from_ref(self) as usize, finish)?;
        self.turn.replace(Some(turn));
        let mut logits = vec![];
        for rows in rows.chunks_mut(MOST_ROWS) {
            // Two launches at once would wait for each other's blocks for ever.
            if let Some(before) = logits.last() {
                transforms::async_eval([before])?;
            }
            logits.push(self.step.run(rows, previous)?);
        }
        match &logits[..] {
            [one] => Ok(one.clone()),
            _ => Ok(ops::concatenate(&logits, 0)?),
        }
    }

    /// What must be kept until the step that was made has been computed.
    pub fn turn(&self) -> Option<Turn> {
        self.turn.take()
    }

    /// As `attention::attend`.
    pub fn attend(
        &self,
        attention: &Attention,
        layer: usize,
        [q, k, v]: [Array; 3],
        segments: &[Segment],
        sequences: &mut [&mut Sequence],
    ) -> Result<Array> {
        let mut outputs = vec![];
        for (segment, sequence) in segments.iter().zip(sequences) {
            let rows = |x: &Array| array::rows(x, &segment.rows);
            let count = segment.rows.len();
            sequence.reserve(segment.start..segment.start + count)?;
            let qkv = [rows(&q)?, rows(&k)?, rows(&v)?];
            let qkv = self.append(layer, qkv, attention, segment, sequence)?;
            let Shape { heads, kv_heads, dim, .. } = self.step.shape;
            let attended = self.attend.run(&Launch {
                inputs: &qkv.each_ref(),
                outputs: &[(&[count as i32, (heads * dim) as i32], Dtype::Bfloat16)],
                blocks: (heads * count.div_ceil(64)) as i32,
                threads: 128,
                constants: &[
                    (c"HEADS", heads as i32),
                    (c"KV_HEADS", kv_heads as i32),
                    (c"DIM", dim as i32),
                ],
            })?;
            outputs.extend(attended);
        }
        match &outputs[..] {
            [one] => Ok(one.clone()),
            _ => Ok(ops::concatenate(&outputs, 0)?),
        }
    }

    /// -> q `[1, heads, rows, dim]`, and all keys and values of the sequence.
    fn append(
        &self,
        layer: usize,
        [q, k, v]: [Array; 3],
        attention: &Attention,
        segment: &Segment,
        sequence: &Sequence,
    ) -> Result<[Array; 3]> {
        let Shape { heads, kv_heads, dim, eps, theta, qk_norm, scaled, .. } = self.step.shape;
        // Without norms something is passed in their place, and not read.
        let none = [&self.rotation; 2];
        let [q_norm, k_norm] = attention.norms.as_ref().map_or(none, |[q, k]| [q, k]);
        let count = segment.rows.len();
        let end = segment.start + count;
        let of = |heads: usize, positions: usize| [1, heads as i32, positions as i32, dim as i32];
        let (own, all) = (of(heads, count), of(kv_heads, end));
        let items = count * (heads + 2 * kv_heads) + segment.start * 2 * kv_heads;
        let outputs = self.append.run(&Launch {
            inputs: &[
                &q,
                &k,
                &v,
                q_norm,
                k_norm,
                &sequence.plan(segment.start),
                &self.layers[layer],
                &self.rotation,
            ],
            outputs: &[own, all, all]
                .map(|shape| (shape, Dtype::Bfloat16))
                .each_ref()
                .map(|(shape, dtype)| (&shape[..], *dtype)),
            blocks: items.div_ceil(8).min(4096) as i32,
            threads: 256,
            constants: &[
                (c"HEADS", heads as i32),
                (c"KV_HEADS", kv_heads as i32),
                (c"DIM", dim as i32),
                (c"EPS_BITS", eps.to_bits() as i32),
                (c"THETA_BITS", theta.to_bits() as i32),
                (c"QK_NORM", i32::from(qk_norm)),
                (c"SCALED", i32::from(scaled)),
            ],
        })?;
        Ok(outputs.try_into().unwrap_or_else(|_| unreachable!("three outputs")))
    }
}

impl Shape {
    /// None where the kernels are not made for it.
    fn of(decoder: &Decoder<Mlx>) -> Option<Self> {
        let first = decoder.layers.first()?;
        let layer = decoder.spec.layers.first()?;
        let AttentionSpec { heads, kv_heads, head_dim: dim, ref rope, .. } = layer.attention;
        let plain = layer.attention.qk_norm.is_none_or(|norm| norm == layer.norm)
            && layer.norm == decoder.spec.norm
            && !(rope.is_dynamic() || layer.attention.o_bias || layer.mlp.bias);
        if !plain || decoder.spec.layers.iter().any(|other| other != layer) {
            return None;
        }
        let [hidden, inner, vocab] = [
            first.o_proj.matrix()?.outputs,
            first.down_proj.matrix()?.inputs,
            decoder.embed_tokens.matrix()?.outputs,
        ];
        let shape = Self {
            hidden,
            inner,
            heads,
            kv_heads,
            dim,
            layers: decoder.layers.len(),
            vocab,
            eps: layer.norm.eps,
            theta: rope.theta,
            qk_norm: layer.attention.qk_norm.is_some(),
            qkv_bias: layer.attention.qkv_bias,
            scaled: rope.scaling != Scaling::None,
        };
        let bf16 = |array: &Array| array.dtype() == Dtype::Bfloat16;
        let fits = |matrix: Option<Matrix>, outputs, inputs| {
            matrix.is_some_and(|it| it.outputs == outputs && it.inputs == inputs && it.is_usual())
        };
        let whole = decoder.layers.iter().all(|layer| {
            fits(layer.qkv_proj.matrix(), (heads + 2 * kv_heads) * dim, hidden)
                && fits(layer.o_proj.matrix(), hidden, heads * dim)
                && fits(layer.gate_up_proj.matrix(), 2 * inner, hidden)
                && fits(layer.down_proj.matrix(), hidden, inner)
                && [&layer.input_layernorm, &layer.post_attention_layernorm].into_iter().all(bf16)
                && layer.attention.norms.iter().flatten().all(bf16)
                && layer.qkv_proj.bias_of_all().into_iter().all(bf16)
        });
        let head = decoder.lm_head.as_ref().unwrap_or(&decoder.embed_tokens);
        let whole = whole
            && bf16(&decoder.norm)
            && fits(decoder.embed_tokens.matrix(), vocab, hidden)
            && fits(head.matrix(), vocab, hidden);
        // Groups of inputs are taken by four where there are many.
        let groups = [hidden, heads * dim, inner].map(|inputs| inputs / 64);
        let whole = whole && groups.into_iter().all(|groups| groups <= 16 || groups % 4 == 0);
        let heads_fit = heads % kv_heads == 0 && heads / kv_heads <= 8;
        (whole && matches!(dim, 64 | 128) && heads_fit).then_some(shape)
    }

    fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.dim
    }
}

/// As `angle_of` of `numbers.cuh` takes it.
fn rotation(rope: &Rope) -> Array {
    let frequencies = rope.frequencies(1).into_iter().map(|frequency| frequency as f32);
    let numbers: Vec<f32> = frequencies.chain([rope.amplitude()]).collect();
    Array::from_slice(&numbers, &[numbers.len() as i32])
}

/// A copy in the card's own memory: what comes from a file is in memory that both share, and moves between
/// them page by page.
pub fn on_card(array: &Array) -> Result<Array> {
    let zero = Array::from_f32(0.0).as_dtype(array.dtype())?;
    let copy = array.add(zero)?;
    transforms::eval([&copy])?;
    Ok(copy)
}

/// How many multiprocessors the card has: so many blocks are all there at once.
fn multiprocessors() -> Result<usize> {
    // More blocks than there can be multiprocessors, each long enough for all of those to take some.
    const BLOCKS: i32 = 2048;
    let kernel = Kernel::new(&Source {
        name: c"bombus_multiprocessors",
        inputs: &[c"x"],
        outputs: &[c"own"],
        header: "",
        body: "const long long start = clock64();\n\
               unsigned number;\n\
               asm volatile(\"mov.u32 %0, %%smid;\" : \"=r\"(number));\n\
               while (clock64() - start < 50000) {}\n\
               if (threadIdx.x == 0) own[blockIdx.x] = number + 0 * x[0];",
        contiguous: true,
        shared: 0,
    })?;
    let own = kernel.run(&Launch {
        inputs: &[&array::indices(&[0])],
        outputs: &[(&[BLOCKS], Dtype::Uint32)],
        blocks: BLOCKS,
        threads: 1024,
        constants: &[],
    })?;
    transforms::eval(&own)?;
    Ok(array::values::<u32>(&own[0])?.into_iter().collect::<HashSet<_>>().len())
}
