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
pub use rotation::Rotations;

use super::float::Float;
use super::rows::Norm;
use super::tensor::{SendPtr, Tensor};
use super::{AttentionWeights, Cpu, Segment, lock};
use crate::error::Result;
use crate::spec::{AttentionSpec, QkNorm, Rope};
use cache::{Layout, PAGE, Pages};
use kernel::Attend;
use prepare::Prepare;
use rotation::Rotation;
use safetensors::tensor::Dtype;
use std::borrow::Cow;
use std::ops::Range;

/// The rows of a prefill that are one tile.
const ROWS: usize = 16;

/// An attention layer but for its linear layers.
pub struct Attention {
    spec: AttentionSpec,
    layout: Layout,
    /// of q and of k
    norms: Option<[Vec<f32>; 2]>,
    /// Radians a position, where that is the same for all lengths.
    frequencies: Vec<f64>,
}

impl Attention {
    pub fn load(spec: &AttentionSpec, weights: &AttentionWeights) -> Result<Self> {
        let norms = match (&weights.norms, spec.qk_norm) {
            (Some([q, k]), Some(QkNorm { spec, .. })) => {
                Some([Norm::load(q, &spec)?.weight, Norm::load(k, &spec)?.weight])
            }
            _ => None,
        };
        let float = if weights.dtype == Dtype::F32 { Float::F32 } else { Float::F16 };
        Ok(Self {
            layout: Layout { heads: spec.kv_heads, dim: spec.head_dim, float },
            frequencies: spec.rope.as_ref().map_or(vec![], |rope| rope.frequencies(1)),
            norms,
            spec: spec.clone(),
        })
    }

    fn frequencies(&self, rope: &Rope, positions: usize) -> Cow<'_, [f64]> {
        match rope.is_dynamic() {
            true => rope.frequencies(positions).into(),
            false => (&self.frequencies[..]).into(),
        }
    }

    /// Makes room for these positions, and lets go of what they do not see.
    pub fn reserve(&self, cache: &mut Cache, positions: Range<usize>) -> Result<()> {
        // A page more stays, for texts that go on from a little before the end.
        cache.forget(self.spec.first_seen(positions.start).saturating_sub(PAGE));
        cache.reserve(positions, &self.layout)
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
    let mut rotations = lock(&cpu.rotations);
    let positions = |segment: &Segment| segment.start..segment.start + segment.rows.len();
    let rotation = rotations.prepare(attention, segments.iter().map(positions).collect());
    let pages = segments.iter().zip(caches).map(|(segment, cache)| {
        attention.reserve(cache, positions(segment))?;
        Ok(cache.pointers())
    });
    let pages = pages.collect::<Result<Vec<_>>>()?;
    let step = Step {
        spec: &attention.spec,
        layout,
        rotation,
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
    /// None: heads are not rotated
    rotation: Option<&'a Rotation>,
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
