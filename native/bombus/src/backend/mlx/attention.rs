//! Attention over the caches of the sequences in a step.

use super::{AttentionWeights, Page, Segment, arrays};
use crate::error::Result;
use crate::spec::{AttentionSpec, Scaling};
use mlx_rs::fast::{self, ScaledDotProductAttentionMask as Mask};
use mlx_rs::ops::indexing::Ellipsis;
use mlx_rs::{Array, ops};

/// The cache grows by this many positions at a time, as mlx-lm's does.
const GROWTH: i32 = 256;

/// Keys and values of one sequence in one layer: `[1, kv_heads, capacity, head_dim]`.
#[derive(Default)]
pub struct LayerCache {
    keys_values: Option<[Array; 2]>,
}

impl LayerCache {
    /// MLX copies the arrays when one of the two is written to.
    pub fn fork(&self, positions: usize) -> Result<Self> {
        let capacity = capacity(positions as i32);
        let cut = |array: &Array| match array.dim(2) > capacity {
            true => arrays::index(array, (Ellipsis, ..capacity, ..)),
            false => Ok(array.clone()),
        };
        let Some([keys, values]) = &self.keys_values else { return Ok(Self::default()) };
        Ok(Self { keys_values: Some([cut(keys)?, cut(values)?]) })
    }

    /// One for the whole of it, named by its place in memory.
    pub fn page(&self) -> Page {
        let bytes = self.keys_values.iter().flatten().map(Array::nbytes).sum();
        Page { id: self as *const Self as usize, bytes }
    }

    /// Writes `new` at `start`; -> keys and values of all positions up to there.
    fn append(&mut self, start: i32, new: [Array; 2]) -> Result<[Array; 2]> {
        let end = start + new[0].dim(2);
        let caches = match self.keys_values.take() {
            Some(caches) if caches[0].dim(2) >= end => caches,
            caches => grown(caches, &new, end)?,
        };
        let [mut keys, mut values] = caches;
        let [new_keys, new_values] = new;
        arrays::set(&mut keys, (Ellipsis, start..end, ..), new_keys)?;
        arrays::set(&mut values, (Ellipsis, start..end, ..), new_values)?;
        let up_to = |cache: &Array| arrays::index(cache, (Ellipsis, ..end, ..));
        let seen = [up_to(&keys)?, up_to(&values)?];
        self.keys_values = Some([keys, values]);
        Ok(seen)
    }
}

/// The positions of a cache that has room for so many.
fn capacity(positions: i32) -> i32 {
    (positions + GROWTH - 1) / GROWTH * GROWTH
}

fn grown(caches: Option<[Array; 2]>, new: &[Array; 2], end: i32) -> Result<[Array; 2]> {
    let capacity = capacity(end);
    let zeros = |like: &Array, positions: i32| {
        let shape = [like.dim(0), like.dim(1), positions, like.dim(3)];
        ops::zeros_dtype(&shape, like.dtype())
    };
    let grow = |old: Option<&Array>, new: &Array| match old {
        None => zeros(new, capacity),
        Some(old) => ops::concatenate(&[old, &zeros(new, capacity - old.dim(2))?], 2),
    };
    let [old_keys, old_values] = match &caches {
        Some([keys, values]) => [Some(keys), Some(values)],
        None => [None, None],
    };
    Ok([grow(old_keys, &new[0])?, grow(old_values, &new[1])?])
}

/// An attention layer but for its linear layers.
pub struct Attention {
    spec: AttentionSpec,
    /// of q's heads and of k's, `[head_dim]`
    pub norms: Option<[Array; 2]>,
    /// Positions a radian, `[head_dim / 2]`, where MLX does not make them of `theta` itself.
    periods: Option<Array>,
}

impl Attention {
    pub fn load(spec: &AttentionSpec, weights: &AttentionWeights) -> Result<Self> {
        let norms = match &weights.norms {
            Some([q, k]) => Some([arrays::load(q)?, arrays::load(k)?]),
            None => None,
        };
        let own = spec.rope.scaling != Scaling::None && !spec.rope.is_dynamic();
        Ok(Self { periods: own.then(|| periods(spec, 1)), norms, spec: spec.clone() })
    }

    /// q, k, v: as `heads` makes them -> `[rows, heads * head_dim]`
    pub fn attend(
        &self,
        [q, k, v]: &[Array; 3],
        segment: &Segment,
        cache: &mut LayerCache,
    ) -> Result<Array> {
        // [rows, heads, head_dim] -> [1, heads, rows, head_dim]
        let own = |x: &Array| -> Result<Array> {
            Ok(arrays::rows(x, &segment.rows)?.transpose_axes(&[1, 0, 2])?.expand_dims(0)?)
        };
        let [q, k] = [self.rotate(own(q)?, segment)?, self.rotate(own(k)?, segment)?];
        let [keys, values] = cache.append(segment.start as i32, [k, own(v)?])?;
        let mask = (segment.rows.len() > 1).then_some(Mask::Causal);
        let (scale, sinks) = (self.spec.scale(), None::<&Array>);
        let attended = fast::scaled_dot_product_attention(q, keys, values, scale, mask, sinks)?;
        let rows = segment.rows.len() as i32;
        Ok(attended.transpose_axes(&[0, 2, 1, 3])?.reshape(&[rows, -1])?)
    }

    /// `[rows, heads, head_dim]` each, q and k normed where there are norms
    pub fn heads(&self, qkv: [Array; 3]) -> Result<[Array; 3]> {
        let heads = |x: Array| x.reshape(&[x.dim(0), -1, self.spec.head_dim as i32]);
        let [q, k, v] = qkv;
        let [q, k, v] = [heads(q)?, heads(k)?, heads(v)?];
        let (Some([q_norm, k_norm]), Some(norm)) = (&self.norms, self.spec.qk_norm) else {
            // MLX 0.32.2 rotates slices wrongly on an H200: q and k lie in one array with v.
            return Ok([q.contiguous()?, k.contiguous()?, v]);
        };
        let q = fast::rms_norm(q, Some(q_norm), norm.eps)?;
        let k = fast::rms_norm(k, Some(k_norm), norm.eps)?;
        Ok([q, k, v])
    }

    /// x: `[1, heads, rows, head_dim]`
    fn rotate(&self, x: Array, segment: &Segment) -> Result<Array> {
        let rope = &self.spec.rope;
        let (dim, start) = (rope.dim as i32, segment.start as i32);
        let amplitude = rope.amplitude();
        let x = match amplitude == 1.0 {
            true => x,
            false => x.multiply(Array::from_f32(amplitude).as_dtype(x.dtype())?)?,
        };
        let own = match (&self.periods, rope.is_dynamic()) {
            (Some(periods), _) => Some(periods.clone()),
            (None, true) => Some(periods(&self.spec, segment.start + segment.rows.len())),
            (None, false) => None,
        };
        let theta = own.is_none().then_some(rope.theta);
        Ok(fast::rope(x, dim, false, theta, 1.0, start, own.as_ref())?)
    }
}

/// For a sequence of so many positions.
fn periods(spec: &AttentionSpec, positions: usize) -> Array {
    let frequencies = spec.rope.frequencies(positions).into_iter();
    let periods: Vec<f32> = frequencies.map(|frequency| (1.0 / frequency) as f32).collect();
    Array::from_slice(&periods, &[periods.len() as i32])
}
