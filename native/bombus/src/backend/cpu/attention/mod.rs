//! Attention over the caches of the sequences in a step.
//!
//! Keys and values are kept in f16 (f32 in an f32 checkpoint), in pages of 64 positions. Sixteen
//! positions of a key lie side by side, so that their scores come out in one vector's lanes. First
//! `prepare` writes all rows' keys and values, then `kernel` attends, tile by tile.

mod cache;
mod kernel;
mod prepare;
mod rotation;

pub use cache::Cache;
pub use rotation::Rotation;

use super::float::Float;
use super::tensor::{SendPtr, Tensor};
use super::{AttentionWeights, Cpu, Segment, lock};
use crate::error::Result;
use crate::spec::AttentionSpec;
use cache::{Layout, Pages};
use kernel::Attend;
use prepare::Prepare;
use safetensors::tensor::Dtype;
use std::borrow::Cow;
use std::ops::Range;

/// The rows of a prefill that are one tile.
const ROWS: usize = 16;

/// An attention layer but for its linear layers.
pub struct Attention {
    spec: AttentionSpec,
    pub layout: Layout,
    /// of q's heads and of k's
    norms: Option<[Vec<f32>; 2]>,
    /// Radians a position, where that is the same for all lengths.
    frequencies: Vec<f64>,
}

impl Attention {
    pub fn load(spec: &AttentionSpec, weights: &AttentionWeights) -> Result<Self> {
        let norms = match &weights.norms {
            Some([q, k]) => Some([Float::read(q)?, Float::read(k)?]),
            None => None,
        };
        let float = if weights.dtype == Dtype::F32 { Float::F32 } else { Float::F16 };
        Ok(Self {
            layout: Layout { heads: spec.kv_heads, dim: spec.head_dim, float },
            frequencies: spec.rope.frequencies(1),
            norms,
            spec: spec.clone(),
        })
    }

    fn frequencies(&self, positions: usize) -> Cow<'_, [f64]> {
        match self.spec.rope.is_dynamic() {
            true => self.spec.rope.frequencies(positions).into(),
            false => (&self.frequencies[..]).into(),
        }
    }
}

pub fn attend(
    cpu: &Cpu,
    attention: &Attention,
    [mut q, k, v]: [Tensor; 3],
    segments: &[Segment],
    caches: &mut [&mut Cache],
) -> Result<Tensor> {
    let layout = attention.layout;
    let mut rotation = lock(&cpu.rotation);
    let positions = |segment: &Segment| segment.start..segment.start + segment.rows.len();
    rotation.prepare(attention, segments.iter().map(positions).collect());
    let pages = segments.iter().zip(caches).map(|(segment, cache)| {
        cache.reserve(positions(segment), &layout)?;
        Ok(cache.pointers())
    });
    let pages = pages.collect::<Result<Vec<_>>>()?;
    let step = Step {
        spec: &attention.spec,
        layout,
        rotation: &rotation,
        norms: attention.norms.as_ref(),
        q: SendPtr(q.data_mut().as_mut_ptr()),
        stride: q.stride,
        k: &k,
        v: &v,
        segments,
        pages: &pages,
    };
    cpu.pool.rows(q.rows, q.width, |rows| {
        // SAFETY: each row is written by one thread, to places of its own.
        unsafe { cpu.level.run(Prepare { step: &step, rows }) };
    });
    let mut out = cpu.spare.tensor(q.rows, q.width);
    let target = SendPtr(out.data_mut().as_mut_ptr());
    let tiles = step.tiles();
    cpu.pool.each(tiles.len(), |tile| {
        // SAFETY: a tile's heads and rows are its own.
        unsafe { cpu.level.run(Attend { step: &step, tile: &tiles[tile], out: target }) };
    });
    Ok(out)
}

/// What all tiles of a step share.
struct Step<'a> {
    spec: &'a AttentionSpec,
    layout: Layout,
    rotation: &'a Rotation,
    norms: Option<&'a [Vec<f32>; 2]>,
    /// Normed and rotated in place; what comes out has rows as far apart.
    q: SendPtr,
    stride: usize,
    k: &'a Tensor,
    v: &'a Tensor,
    segments: &'a [Segment],
    pages: &'a [Pages],
}

/// One head of keys, and some rows of a segment.
struct Tile {
    segment: usize,
    head: usize,
    /// counted from the segment's first
    rows: Range<usize>,
}

impl Step<'_> {
    fn tiles(&self) -> Vec<Tile> {
        let mut tiles = vec![];
        for (segment, Segment { rows, .. }) in self.segments.iter().enumerate() {
            for first in (0..rows.len()).step_by(ROWS) {
                for head in 0..self.layout.heads {
                    let rows = first..rows.len().min(first + ROWS);
                    tiles.push(Tile { segment, head, rows });
                }
            }
        }
        // The longest first: what is left at the end is short.
        tiles.sort_by_key(|tile| std::cmp::Reverse(self.reach(tile)));
        tiles
    }

    fn reach(&self, tile: &Tile) -> usize {
        self.segments[tile.segment].start + tile.rows.end
    }
}
