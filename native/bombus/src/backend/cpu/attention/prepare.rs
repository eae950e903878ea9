//! Before attention: heads are normed and rotated, keys and values go into the cache.

use super::super::float::Float;
use super::super::rows::{load_partial, norm_factor};
use super::super::simd::{Kernel, LANES, Simd};
use super::Step;
use super::cache::{Layout, PAGE};
use crate::spec::NormSpec;
use std::ops::Range;

/// Norms and rotates the heads of q and k in `rows`, and puts k and v into the cache.
pub struct Prepare<'a> {
    pub step: &'a Step<'a>,
    pub rows: Range<usize>,
}

impl Kernel for Prepare<'_> {
    type Output = ();

    /// # Safety
    /// Each row is one thread's: its queries, and its positions in the pages, which are this sequence's own.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let step = self.step;
        for (index, segment) in step.segments.iter().enumerate() {
            let rows = self.rows.start.max(segment.rows.start)..self.rows.end.min(segment.rows.end);
            for row in rows {
                let position = segment.start + row - segment.rows.start;
                let page = step.pages[index].0[position / PAGE];
                self.queries::<S>(row);
                self.keys_values::<S>(row, page, position % PAGE);
            }
        }
    }
}

impl Prepare<'_> {
    /// # Safety
    /// `row` is a row of q, and no other thread's.
    #[inline(always)]
    unsafe fn queries<S: Simd>(&self, row: usize) {
        let dim = self.step.layout.dim;
        let scale = self.step.spec.scale();
        let norm = self.step.norms.map(|[q, _]| &q[..]);
        let mut rotated = vec![0.0; dim];
        for head in 0..self.step.spec.heads {
            let q = self.step.q.at(row * self.step.stride + head * dim);
            let q = std::slice::from_raw_parts_mut(q, dim);
            self.rotate::<S>(row, q, norm, scale, &mut rotated);
            q.copy_from_slice(&rotated);
        }
    }

    /// # Safety
    /// `page` is a whole page that this thread may write to at `place`, which is below `PAGE`.
    #[inline(always)]
    unsafe fn keys_values<S: Simd>(&self, row: usize, page: *mut u8, place: usize) {
        let Layout { heads, dim, float } = self.step.layout;
        let wide = self.step.layout.value_dim();
        let norm = self.step.norms.map(|[_, k]| &k[..]);
        let mut rotated = vec![0.0; wide];
        for head in 0..heads {
            let k = &self.step.k.row(row)[head * dim..][..dim];
            let v = &self.step.v.row(row)[head * dim..][..dim];
            self.rotate::<S>(row, k, norm, 1.0, &mut rotated[..dim]);
            let first = self.step.layout.keys(head) + place / LANES * LANES * dim + place % LANES;
            put::<S>(float, page, first, LANES, &rotated, dim);
            rotated[..dim].copy_from_slice(v);
            rotated[dim..].fill(0.0);
            let first = self.step.layout.values(head) + place * wide;
            put::<S>(float, page, first, 1, &rotated, dim);
        }
    }

    /// A head, normed where there is a norm, rotated by the row's position, times `scale`.
    ///
    /// # Safety
    /// The machine has S's level; x, `out` and the norm have the head's width, and the rotation has `row`.
    #[inline(always)]
    unsafe fn rotate<S: Simd>(
        &self,
        row: usize,
        x: &[f32],
        norm: Option<&[f32]>,
        scale: f32,
        out: &mut [f32],
    ) {
        let half = x.len() / 2;
        let (cos, sin) =
            (&self.step.rotation.cos[row * half..], &self.step.rotation.sin[row * half..]);
        let factor = match (norm, self.step.spec.qk_norm) {
            (Some(_), Some(NormSpec { eps })) => norm_factor::<S>(x, eps) * scale,
            _ => scale,
        };
        let factor = S::splat(factor);
        for place in (0..half).step_by(LANES) {
            let lanes = LANES.min(half - place);
            let low = S::mul(factor, weighted::<S>(x, norm, place, lanes));
            let high = S::mul(factor, weighted::<S>(x, norm, half + place, lanes));
            let (cos, sin) =
                (load_partial::<S>(cos, place, lanes), load_partial::<S>(sin, place, lanes));
            let rotated =
                [S::sub(S::mul(low, cos), S::mul(high, sin)), S::fma(low, sin, S::mul(high, cos))];
            S::store_partial(out.as_mut_ptr().add(place), rotated[0], lanes);
            S::store_partial(out.as_mut_ptr().add(half + place), rotated[1], lanes);
        }
    }
}

/// Lanes of x, times the norm's weight where there is one.
///
/// # Safety
/// As `load_partial`, for x and the norm.
#[inline(always)]
unsafe fn weighted<S: Simd>(x: &[f32], norm: Option<&[f32]>, place: usize, lanes: usize) -> S::F {
    let x = load_partial::<S>(x, place, lanes);
    match norm {
        Some(norm) => S::mul(x, load_partial::<S>(norm, place, lanes)),
        None => x,
    }
}

/// Writes x to numbers `first`, `first + step`, ... of a page.
///
/// # Safety
/// The machine has S's level; `page` holds numbers of this type up to `first + (count - 1) * step`, x has
/// `count`, and no other thread uses those places.
#[inline(always)]
unsafe fn put<S: Simd>(
    float: Float,
    page: *mut u8,
    first: usize,
    step: usize,
    x: &[f32],
    count: usize,
) {
    for start in (0..count).step_by(LANES) {
        let lanes = LANES.min(count - start);
        let x = load_partial::<S>(x, start, lanes);
        let mut halves = [0u16; LANES];
        let mut floats = [0f32; LANES];
        match float {
            Float::F32 => S::store(floats.as_mut_ptr(), x),
            _ => {
                // The largest of f16; beyond it lies infinity.
                let limit = S::splat(65504.0);
                let low = S::sub(S::splat(0.0), limit);
                S::store_f16(halves.as_mut_ptr(), S::min(limit, S::max(low, x)));
            }
        }
        for lane in 0..lanes {
            let place = first + (start + lane) * step;
            match float {
                Float::F32 => page.cast::<f32>().add(place).write_unaligned(floats[lane]),
                _ => page.cast::<u16>().add(place).write_unaligned(halves[lane]),
            }
        }
    }
}
