//! Attention of a prompt's rows over pages of keys and values.

use super::kernel::{Kernel, Launch, Source};
use super::layout::{LayerKind, PAGE_POSITIONS};
use super::pages::{Addresses, Pool, Sequence};
use super::{NUMBERS, PRIMITIVES, Shape, on_card};
use crate::backend::{Segment, arrays};
use crate::error::Result;
use crate::spec::Rope;
use mlx_rs::{Array, Dtype, ops};
use std::rc::Rc;

/// The kernels of a model's attention, and the pages of all its sequences.
pub struct PagedAttention {
    shape: Shape,
    append: Kernel,
    attend: Kernel,
    pool: Rc<Pool>,
    kinds: Vec<LayerKind>,
    /// Numbers of layers, each on the card.
    layers: Vec<Array>,
    /// As `angle_of` of `numbers.cuh` takes them, of each kind of layers.
    rotations: Vec<Array>,
    /// one below the other
    pub rotation: Array,
}

impl PagedAttention {
    /// kinds: of all layers
    pub fn new(
        shape: Shape,
        kinds: Vec<LayerKind>,
        ropes: &[&Rope],
        addresses: Rc<Addresses>,
    ) -> Result<Self> {
        let page_bytes = shape.layers * 2 * shape.kv_heads * PAGE_POSITIONS * shape.dim * 2;
        let pool = Pool::new(addresses, page_bytes)?;
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
        let layers = (0..shape.layers).map(|layer| on_card(&arrays::indices(&[layer])));
        let layers = layers.collect::<Result<_>>()?;
        let rotations = ropes.iter().map(|rope| on_card(&rotation(rope)));
        let rotations: Vec<Array> = rotations.collect::<Result<_>>()?;
        let rotation = on_card(&stacked(&rotations)?)?;
        Ok(Self { shape, append, attend, pool, kinds, layers, rotations, rotation })
    }

    pub fn sequence(self: &Rc<Self>) -> Sequence {
        Sequence::new(self, &self.pool)
    }

    /// What all layers see of a sequence, where none sees everything. Full layers need all pages, which
    /// windowed ones of the same model keep with them: a page has all layers.
    pub fn window_of_all(&self) -> Option<usize> {
        let all = self.kinds.iter().all(|kind| kind.windowed);
        all.then_some(self.shape.window)
    }

    /// The window of a layer, 0 where it has none.
    fn window(&self, layer: usize) -> usize {
        if self.kinds[layer].windowed { self.shape.window } else { 0 }
    }

    /// q, k, v: `[rows, heads * dim]`; norms: of heads of q and k -> `[rows, heads * dim]`
    pub fn attend(
        &self,
        layer: usize,
        [q, k, v]: &[Array; 3],
        norms: Option<&[Array; 2]>,
        segment: &Segment,
        sequence: &mut Sequence,
    ) -> Result<Array> {
        let rows = |x: &Array| arrays::rows(x, &segment.rows);
        let count = segment.rows.len();
        sequence.reserve(segment.start..segment.start + count)?;
        let qkv = self.append(layer, [rows(q)?, rows(k)?, rows(v)?], norms, segment, sequence)?;
        let Shape { heads, kv_heads, dim, factors, .. } = self.shape;
        let mut attended = self.attend.run(&Launch {
            inputs: &qkv.each_ref(),
            outputs: &[(&[count as i32, (heads * dim) as i32], Dtype::Bfloat16)],
            blocks: (heads * count.div_ceil(64)) as i32,
            threads: 128,
            constants: &[
                (c"HEADS", heads as i32),
                (c"KV_HEADS", kv_heads as i32),
                (c"DIM", dim as i32),
                (c"WINDOW", self.window(layer) as i32),
                (c"SCORE_FACTOR_BITS", factors.scores.map_or(0, f32::to_bits) as i32),
            ],
        })?;
        Ok(attended.swap_remove(0))
    }

    /// -> q `[1, heads, rows, dim]`, and the keys and values of the sequence that these rows see.
    fn append(
        &self,
        layer: usize,
        [q, k, v]: [Array; 3],
        norms: Option<&[Array; 2]>,
        segment: &Segment,
        sequence: &Sequence,
    ) -> Result<[Array; 3]> {
        let Shape { heads, kv_heads, dim, eps, theta, qk_norm, scaled, .. } = self.shape;
        let Shape { query_beta, query_context, .. } = self.shape;
        // Without norms something is passed in their place, and not read.
        let rotation = &self.rotations[self.kinds[layer].rotation];
        let [q_norm, k_norm] = norms.map_or([rotation; 2], |norms| norms.each_ref());
        let count = segment.rows.len();
        let window = self.window(layer);
        let unseen = if window == 0 { 0 } else { (segment.start + 1).saturating_sub(window) };
        let (old, seen) = (segment.start - unseen, segment.start + count - unseen);
        let of = |heads: usize, positions: usize| [1, heads as i32, positions as i32, dim as i32];
        let (own, all) = (of(heads, count), of(kv_heads, seen));
        let items = count * (heads + 2 * kv_heads) + old * 2 * kv_heads;
        let plan = sequence.plan(segment.start);
        let outputs = self.append.run(&Launch {
            inputs: &[&q, &k, &v, q_norm, k_norm, &plan, &self.layers[layer], rotation],
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
                (c"WINDOW", window as i32),
                (c"QUERY_BETA_BITS", query_beta.to_bits() as i32),
                (c"QUERY_CONTEXT", query_context as i32),
                (c"ROTATED", i32::from(!self.kinds[layer].unrotated)),
            ],
        })?;
        Ok(outputs.try_into().unwrap_or_else(|_| unreachable!("three outputs")))
    }
}

/// One below the other.
pub fn stacked(outputs: &[Array]) -> Result<Array> {
    match outputs {
        [one] => Ok(one.clone()),
        _ => Ok(ops::concatenate(outputs, 0)?),
    }
}

/// Radians a position of every pair of a head, and what the head is multiplied by.
fn rotation(rope: &Rope) -> Array {
    let frequencies = rope.frequencies(1).into_iter().map(|frequency| frequency as f32);
    let numbers: Vec<f32> = frequencies.chain([rope.amplitude()]).collect();
    Array::from_slice(&numbers, &[numbers.len() as i32])
}
