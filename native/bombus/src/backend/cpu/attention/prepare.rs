//! Before attention: heads are normed and rotated, keys and values go into the cache.

use super::super::float::Float;
use super::super::rows::{load_partial, norm_factor};
use super::super::simd::{Kernel, LANES, Simd};
use super::cache::{Layout, PAGE};
use super::{Rotation, Step};
use crate::spec::{NormedHeads, QkNorm};
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
                let page = step.pages[index].page(position / PAGE);
                self.queries::<S>(row, position);
                self.keys_values::<S>(row, page, position % PAGE);
            }
        }
    }
}

/// What is done to a head before it goes on.
struct Change<'a> {
    row: usize,
    /// Of the head, or of all heads together.
    factor: f32,
    /// The head's own, before it is rotated.
    norm: Option<&'a [f32]>,
    /// or once it is rotated
    norm_rotated: Option<&'a [f32]>,
}

impl Prepare<'_> {
    /// # Safety
    /// `row` is a row of q, and no other thread's; it stands at `position` of its sequence.
    #[inline(always)]
    unsafe fn queries<S: Simd>(&self, row: usize, position: usize) {
        let Step { spec, layout, .. } = self.step;
        let scale = spec.scale * spec.query_scaling.map_or(1.0, |scaling| scaling.factor(position));
        let all = self.step.q.at(row * self.step.stride);
        let all = std::slice::from_raw_parts_mut(all, spec.heads * layout.dim);
        let whole = self.factor_of_all::<S>(all);
        let mut rotated = vec![0.0; layout.dim];
        for head in 0..spec.heads {
            let q = &mut all[head * layout.dim..][..layout.dim];
            let change = self.change::<S>(row, q, head, 0, whole, scale);
            self.rotate::<S>(&change, q, &mut rotated);
            q.copy_from_slice(&rotated);
        }
    }

    /// # Safety
    /// `page` is a whole page that this thread may write to at `place`, which is below `PAGE`.
    #[inline(always)]
    unsafe fn keys_values<S: Simd>(&self, row: usize, page: *mut u8, place: usize) {
        let Layout { heads, dim, float } = self.step.layout;
        let wide = self.step.layout.value_dim();
        let whole = self.factor_of_all::<S>(self.step.k.row(row));
        let mut rotated = vec![0.0; wide];
        for head in 0..heads {
            let k = &self.step.k.row(row)[head * dim..][..dim];
            let v = &self.step.v.row(row)[head * dim..][..dim];
            let change = self.change::<S>(row, k, head, 1, whole, 1.0);
            self.rotate::<S>(&change, k, &mut rotated[..dim]);
            let first = self.step.layout.keys(head) + place / LANES * LANES * dim + place % LANES;
            put::<S>(float, page, first, LANES, &rotated, dim);
            rotated[..dim].copy_from_slice(v);
            rotated[dim..].fill(0.0);
            let first = self.step.layout.values(head) + place * wide;
            put::<S>(float, page, first, 1, &rotated, dim);
        }
    }

    /// The factor of a norm of all heads together; 1 where there is no such norm.
    ///
    /// # Safety
    /// The machine has S's level.
    #[inline(always)]
    unsafe fn factor_of_all<S: Simd>(&self, x: &[f32]) -> f32 {
        match self.step.spec.qk_norm {
            Some(QkNorm { spec, heads: NormedHeads::All, .. }) => norm_factor::<S>(x, spec.eps),
            _ => 1.0,
        }
    }

    /// `kind`: 0 for q, 1 for k; `scale`: also of the head
    ///
    /// # Safety
    /// The machine has S's level; x is head number `head` of that kind.
    #[inline(always)]
    unsafe fn change<S: Simd>(
        &self,
        row: usize,
        x: &[f32],
        head: usize,
        kind: usize,
        whole: f32,
        scale: f32,
    ) -> Change<'_> {
        let plain = Change { row, factor: scale, norm: None, norm_rotated: None };
        let (Some(norm), Some(norms)) = (self.step.spec.qk_norm, self.step.norms) else {
            return plain;
        };
        let weight = Some(&norms[kind][..]);
        // The root mean square of a head is the same once it is rotated: only in its place is the
        // weight another's.
        let each = || norm_factor::<S>(x, norm.spec.eps) * scale;
        match norm.heads {
            NormedHeads::Each => Change { factor: each(), norm: weight, ..plain },
            NormedHeads::EachRotated => Change { factor: each(), norm_rotated: weight, ..plain },
            NormedHeads::All => {
                let own = &norms[kind][head * x.len()..][..x.len()];
                Change { factor: whole * scale, norm: Some(own), ..plain }
            }
        }
    }

    /// A head, normed, rotated by the row's position as far as it is rotated, times the factor.
    ///
    /// # Safety
    /// The machine has S's level; x, `out` and the norms have the head's width, and the rotation has the
    /// change's row.
    #[inline(always)]
    unsafe fn rotate<S: Simd>(&self, change: &Change, x: &[f32], out: &mut [f32]) {
        let factor = S::splat(change.factor);
        for place in (0..x.len()).step_by(LANES) {
            let lanes = LANES.min(x.len() - place);
            let x = S::mul(factor, weighted::<S>(x, change.norm, place, lanes));
            S::store_partial(out.as_mut_ptr().add(place), x, lanes);
        }
        if let Some(rotation) = self.step.rotation {
            rotate::<S>(rotation, change.row, out);
        }
        if change.norm_rotated.is_some() {
            for place in (0..x.len()).step_by(LANES) {
                let lanes = LANES.min(x.len() - place);
                let y = weighted::<S>(out, change.norm_rotated, place, lanes);
                S::store_partial(out.as_mut_ptr().add(place), y, lanes);
            }
        }
    }
}

/// Rotates the first numbers of a head. Neighbours that are rotated together are taken apart for it, as
/// halves, and put back.
///
/// # Safety
/// The machine has S's level; the rotation has `row`, and x what it rotates.
#[inline(always)]
unsafe fn rotate<S: Simd>(rotation: &Rotation, row: usize, x: &mut [f32]) {
    let half = rotation.dim() / 2;
    let x = &mut x[..2 * half];
    if rotation.is_interleaved() {
        let apart: Vec<f32> = (0..2 * half).map(|at| x[at % half * 2 + at / half]).collect();
        x.copy_from_slice(&apart);
    }
    let (cos, sin) = (&rotation.cos[row * half..], &rotation.sin[row * half..]);
    for place in (0..half).step_by(LANES) {
        let lanes = LANES.min(half - place);
        let (low, high) =
            (load_partial::<S>(x, place, lanes), load_partial::<S>(x, half + place, lanes));
        let (cos, sin) =
            (load_partial::<S>(cos, place, lanes), load_partial::<S>(sin, place, lanes));
        let rotated =
            [S::sub(S::mul(low, cos), S::mul(high, sin)), S::fma(low, sin, S::mul(high, cos))];
        S::store_partial(x.as_mut_ptr().add(place), rotated[0], lanes);
        S::store_partial(x.as_mut_ptr().add(half + place), rotated[1], lanes);
    }
    if rotation.is_interleaved() {
        let together: Vec<f32> = (0..2 * half).map(|at| x[at % 2 * half + at / 2]).collect();
        x.copy_from_slice(&together);
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
