//! Attention over the caches of the sequences in a step.

use super::{AttentionWeights, Page, Segment, arrays, normed};
use crate::error::Result;
use crate::spec::{AttentionSpec, NormedHeads, QkNorm, Rope, Scaling};
use mlx_rs::fast::{self, ScaledDotProductAttentionMask as Mask};
use mlx_rs::ops::indexing::Ellipsis;
use mlx_rs::{Array, ops};
use std::ops::Range;

/// The cache grows by this many positions at a time, as mlx-lm's does.
const GROWTH: i32 = 256;

/// What stays before a window, for texts that go on from a little before the end.
const SLACK: i32 = 64;

/// Keys and values of one sequence in one layer: `[1, kv_heads, capacity, head_dim]`.
#[derive(Default)]
pub struct LayerCache {
    /// The position of the arrays' first.
    first: i32,
    keys_values: Option<[Array; 2]>,
}

impl LayerCache {
    /// MLX copies the arrays when one of the two is written to.
    pub fn fork(&self, positions: usize) -> Result<Self> {
        let capacity = capacity((positions as i32 - self.first).max(0));
        let cut = |array: &Array| match array.dim(2) > capacity {
            true => arrays::index(array, (Ellipsis, ..capacity, ..)),
            false => Ok(array.clone()),
        };
        let Some([keys, values]) = &self.keys_values else { return Ok(Self::default()) };
        Ok(Self { first: self.first, keys_values: Some([cut(keys)?, cut(values)?]) })
    }

    pub fn kept_from(&self) -> usize {
        self.first as usize
    }

    /// One for the whole of it, named by its place in memory.
    pub fn page(&self) -> Page {
        let bytes = self.keys_values.iter().flatten().map(Array::nbytes).sum();
        Page { id: self as *const Self as usize, bytes }
    }

    /// Writes `new` at `start`; -> keys and values of all positions from `seen` up to there.
    fn append(&mut self, seen: i32, start: i32, new: [Array; 2]) -> Result<[Array; 2]> {
        let end = start + new[0].dim(2);
        let [mut keys, mut values] = match self.keys_values.take() {
            Some(caches) if self.first + caches[0].dim(2) >= end => caches,
            caches => {
                let kept = (seen - SLACK).clamp(self.first, start.max(self.first));
                let old = self.first..start;
                self.first = kept;
                grown(caches, kept - old.start..old.end - old.start, &new, end - kept)?
            }
        };
        let [new_keys, new_values] = new;
        let written = start - self.first..end - self.first;
        arrays::set(&mut keys, (Ellipsis, written.clone(), ..), new_keys)?;
        arrays::set(&mut values, (Ellipsis, written.clone(), ..), new_values)?;
        let range = seen - self.first..written.end;
        let of = |cache: &Array| arrays::index(cache, (Ellipsis, range.clone(), ..));
        let seen = [of(&keys)?, of(&values)?];
        self.keys_values = Some([keys, values]);
        Ok(seen)
    }
}

/// The positions of a cache that has room for so many.
fn capacity(positions: i32) -> i32 {
    (positions + GROWTH - 1) / GROWTH * GROWTH
}

/// Those of the old positions that are kept, and room for as many as `end`.
fn grown(
    caches: Option<[Array; 2]>,
    kept: Range<i32>,
    new: &[Array; 2],
    end: i32,
) -> Result<[Array; 2]> {
    let capacity = capacity(end);
    let zeros = |like: &Array, positions: i32| {
        let shape = [like.dim(0), like.dim(1), positions, like.dim(3)];
        ops::zeros_dtype(&shape, like.dtype())
    };
    let grow = |old: Option<&Array>, new: &Array| -> Result<Array> {
        let Some(old) = old else { return Ok(zeros(new, capacity)?) };
        let old = match kept.start {
            0 => old.clone(),
            start => arrays::index(old, (Ellipsis, start..kept.end, ..))?,
        };
        let more = zeros(new, capacity - old.dim(2))?;
        Ok(ops::concatenate(&[&old, &more], 2)?)
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
    /// of q and of k
    pub norms: Option<[Array; 2]>,
    /// Positions a radian, `[dim / 2]`, where MLX does not make them of `theta` itself.
    periods: Option<Array>,
}

impl Attention {
    pub fn load(spec: &AttentionSpec, weights: &AttentionWeights) -> Result<Self> {
        let norms = match (&weights.norms, spec.qk_norm) {
            (Some([q, k]), Some(QkNorm { spec, .. })) => {
                Some([super::load_norm(q, &spec)?, super::load_norm(k, &spec)?])
            }
            _ => None,
        };
        let own = |rope: &&Rope| rope.scaling != Scaling::None && !rope.is_dynamic();
        let periods = spec.rope.as_ref().filter(own).map(|rope| periods(rope, 1));
        Ok(Self { periods, norms, spec: spec.clone() })
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
        let [q, k] = self.norm_heads([q, k], NormedHeads::EachRotated)?;
        let q = self.scale_queries(q, segment)?;
        let seen = self.spec.first_seen(segment.start) as i32;
        let [keys, values] = cache.append(seen, segment.start as i32, [k, own(v)?])?;
        let mask = self.mask(segment)?;
        let attended = match self.spec.softcap {
            Some(cap) => self.capped(cap, q, keys, values, mask.as_ref())?,
            None => {
                let several = segment.rows.len() > 1;
                let mask = match &mask {
                    Some(mask) => Some(Mask::Array(mask)),
                    None => several.then_some(Mask::Causal),
                };
                let sinks = None::<&Array>;
                fast::scaled_dot_product_attention(q, keys, values, self.spec.scale, mask, sinks)?
            }
        };
        let rows = segment.rows.len() as i32;
        Ok(attended.transpose_axes(&[0, 2, 1, 3])?.reshape(&[rows, -1])?)
    }

    /// What each row sees of the keys, `[rows, keys]`, where that is not simply all that was before.
    fn mask(&self, segment: &Segment) -> Result<Option<Array>> {
        let positions = segment.start..segment.start + segment.rows.len();
        let first = self.spec.first_seen(positions.start);
        let is_plain =
            self.spec.softcap.is_none() && self.spec.first_seen(positions.end - 1) == first;
        if positions.len() == 1 || is_plain {
            return Ok(None);
        }
        let numbers =
            |from: usize| Array::arange::<i32, i32>(from as i32, positions.end as i32, None);
        let (rows, keys) = (numbers(positions.start)?.reshape(&[-1, 1])?, numbers(first)?);
        let seen = keys.le(&rows)?;
        let Some(window) = self.spec.window else { return Ok(Some(seen)) };
        let window = Array::from_int(i32::try_from(window).unwrap_or(i32::MAX));
        Ok(Some(seen.logical_and(keys.gt(rows.subtract(window)?)?)?))
    }

    /// Attention with a cap on its scores, as mlx-lm's `models/gemma2.py` has it.
    fn capped(
        &self,
        cap: f32,
        q: Array,
        keys: Array,
        values: Array,
        mask: Option<&Array>,
    ) -> Result<Array> {
        let number = |number: f32| Array::from_f32(number).as_dtype(q.dtype());
        let (rows, dim) = (q.dim(2), q.dim(3));
        let shape = [1, self.spec.kv_heads as i32, self.spec.group() as i32, rows, dim];
        let queries = q.multiply(number(self.spec.scale)?)?.reshape(&shape)?;
        let keys = keys.expand_dims(2)?.swap_axes(-1, -2)?;
        let scores = queries.matmul(&keys)?.divide(number(cap)?)?;
        let mut scores = ops::tanh(&scores)?.multiply(number(cap)?)?;
        if let Some(mask) = mask {
            let lowest = Array::from_f32(f32::NEG_INFINITY).as_dtype(scores.dtype())?;
            scores = ops::select(mask, &scores, &lowest)?;
        }
        let weights = ops::softmax_axis(&scores, -1, true)?;
        let attended = weights.matmul(values.expand_dims(2)?)?;
        Ok(attended.reshape(&[1, self.spec.heads as i32, rows, dim])?)
    }

    /// `[rows, heads, head_dim]` each, q and k normed where they are before they are rotated
    pub fn heads(&self, [q, k, v]: [Array; 3]) -> Result<[Array; 3]> {
        let heads = |x: Array| x.reshape(&[x.dim(0), -1, self.spec.head_dim as i32]);
        let [q, k] = self.norm_heads([q, k], NormedHeads::All)?;
        let [q, k] = self.norm_heads([heads(q)?, heads(k)?], NormedHeads::Each)?;
        let v = heads(v)?;
        match self.spec.qk_norm {
            Some(norm) if norm.heads != NormedHeads::EachRotated => Ok([q, k, v]),
            // MLX 0.32.2 rotates slices wrongly on an H200: q and k lie in one array with v.
            _ => Ok([q.contiguous()?, k.contiguous()?, v]),
        }
    }

    /// q and k, normed where the norm is of these.
    fn norm_heads(&self, [q, k]: [Array; 2], heads: NormedHeads) -> Result<[Array; 2]> {
        match (&self.norms, self.spec.qk_norm) {
            (Some([q_norm, k_norm]), Some(norm)) if norm.heads == heads => {
                Ok([normed(&q, q_norm, &norm.spec)?, normed(&k, k_norm, &norm.spec)?])
            }
            _ => Ok([q, k]),
        }
    }

    /// x: `[1, heads, rows, head_dim]`
    fn rotate(&self, x: Array, segment: &Segment) -> Result<Array> {
        let Some(rope) = &self.spec.rope else { return Ok(x) };
        let (dim, start) = (rope.dim as i32, segment.start as i32);
        let x = match rope.amplitude() {
            1.0 => x,
            amplitude => {
                // Of what is rotated alone.
                let factor = |at| if at < rope.dim { amplitude } else { 1.0 };
                let factors: Vec<f32> = (0..self.spec.head_dim).map(factor).collect();
                let factors = Array::from_slice(&factors, &[factors.len() as i32]);
                x.multiply(factors.as_dtype(x.dtype())?)?
            }
        };
        let own = match (&self.periods, rope.is_dynamic()) {
            (Some(periods), _) => Some(periods.clone()),
            (None, true) => Some(periods(rope, segment.start + segment.rows.len())),
            (None, false) => None,
        };
        let theta = own.is_none().then_some(rope.theta);
        Ok(fast::rope(x, dim, rope.interleaved, theta, 1.0, start, own.as_ref())?)
    }

    /// q: `[1, heads, rows, head_dim]`
    fn scale_queries(&self, q: Array, segment: &Segment) -> Result<Array> {
        let Some(scaling) = self.spec.query_scaling else { return Ok(q) };
        let positions = segment.start..segment.start + segment.rows.len();
        let factors: Vec<f32> = positions.map(|position| scaling.factor(position)).collect();
        let factors = Array::from_slice(&factors, &[factors.len() as i32, 1]);
        Ok(q.multiply(factors.as_dtype(q.dtype())?)?)
    }
}

/// For a sequence of so many positions.
fn periods(rope: &Rope, positions: usize) -> Array {
    let frequencies = rope.frequencies(positions).into_iter();
    let periods: Vec<f32> = frequencies.map(|frequency| (1.0 / frequency) as f32).collect();
    Array::from_slice(&periods, &[periods.len() as i32])
}
