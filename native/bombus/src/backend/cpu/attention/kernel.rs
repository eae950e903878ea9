//! Attention of some rows to one head of keys, page by page.
//!
//! The softmax is made on the way (Milakov and Gimelshein, "Online normalizer calculation for
//! softmax", 2018): each page's scores become weights beside the largest score so far, and what was
//! found before fades where that grows. Up to four queries at a time share every key and value that is
//! read.

use super::super::float::Float;
use super::super::rows::Softcap;
use super::super::simd::{Kernel, LANES, Simd, prefetch};
use super::super::tensor::SendPtr;
use super::cache::{Layout, PAGE};
use super::{Step, Tile};
use std::ops::Range;

pub struct Attend<'a> {
    pub step: &'a Step<'a>,
    pub tile: &'a Tile,
    pub out: SendPtr,
}

impl Kernel for Attend<'_> {
    type Output = ();

    /// # Safety
    /// The tile's heads and rows of `out` are no other thread's; all pages up to its last position are written.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        match self.step.layout.float {
            Float::F32 => self.queries::<S, false>(),
            _ => self.queries::<S, true>(),
        }
    }
}

impl Attend<'_> {
    /// Some queries at a time: each has a row, and a head that reads the tile's key head.
    ///
    /// # Safety
    /// As `run`; `HALF` says how the pages lie.
    #[inline(always)]
    unsafe fn queries<S: Simd, const HALF: bool>(&self) {
        let shared_by = self.step.spec.group();
        let Tile { head, ref rows, .. } = *self.tile;
        let query =
            |index: usize| (rows.start + index / shared_by, head * shared_by + index % shared_by);
        let count = rows.len() * shared_by;
        let mut done = 0;
        while done < count {
            let four = std::array::from_fn(|place| query((done + place).min(count - 1)));
            done += match count - done {
                1 => self.some::<S, HALF, 1>([four[0]]),
                2 | 3 => self.some::<S, HALF, 2>([four[0], four[1]]),
                _ => self.some::<S, HALF, 4>(four),
            };
        }
    }

    /// -> how many there were
    ///
    /// # Safety
    /// As `run`; the queries are the tile's, in ascending rows.
    #[inline(always)]
    unsafe fn some<S: Simd, const HALF: bool, const Q: usize>(
        &self,
        queries: [(usize, usize); Q],
    ) -> usize {
        let step = self.step;
        let segment = &step.segments[self.tile.segment];
        let Layout { dim, .. } = step.layout;
        let mut q = [std::ptr::null::<f32>(); Q];
        let mut seen: [Range<usize>; Q] = std::array::from_fn(|_| 0..0);
        for (place, (row, head)) in queries.into_iter().enumerate() {
            q[place] = step.q.at((segment.rows.start + row) * step.stride + head * dim);
            let position = segment.start + row;
            seen[place] = step.spec.first_seen(position)..position + 1;
        }
        // The rows ascend, so the first query sees the earliest, the last the latest.
        let (start, end) = (seen[0].start, seen[Q - 1].end);
        let pages = &step.pages[self.tile.segment];
        let mut state = State::<Q> {
            highest: [f32::NEG_INFINITY; Q],
            total: [0.0; Q],
            acc: vec![0.0; Q * step.layout.value_dim()],
            scores: [[0.0; PAGE]; Q],
        };
        for page in start / PAGE..end.div_ceil(PAGE) {
            let base = pages.page(page);
            let first = page * PAGE;
            let count = PAGE.min(end - first);
            self.score::<S, HALF, Q>(base, count, &q, &mut state);
            for (scores, seen) in state.scores.iter_mut().zip(&seen) {
                if let Some(cap) = step.spec.softcap {
                    Softcap { x: &mut scores[..count], cap }.run::<S>();
                }
                let within = |position: usize| position.saturating_sub(first).min(PAGE);
                scores[..within(seen.start)].fill(f32::NEG_INFINITY);
                scores[within(seen.end)..count.next_multiple_of(LANES)].fill(f32::NEG_INFINITY);
            }
            state.soften::<S>(count, step.layout.value_dim());
            let next = pages.get(page + 1);
            self.mix::<S, HALF, Q>(base, next.unwrap_or(base), count, &mut state);
        }
        for (place, (row, head)) in queries.into_iter().enumerate() {
            let acc = &state.acc[place * step.layout.value_dim()..][..dim];
            let factor = 1.0 / state.total[place];
            for (d, acc) in acc.iter().enumerate() {
                let at = (segment.rows.start + row) * step.stride + head * dim + d;
                *self.out.at(at) = acc * factor;
            }
        }
        Q
    }

    /// `scores[query][position] = q . k`
    ///
    /// # Safety
    /// `page` is a whole page, each q has `dim` numbers, and `count` is at most `PAGE`.
    #[inline(always)]
    unsafe fn score<S: Simd, const HALF: bool, const Q: usize>(
        &self,
        page: *const u8,
        count: usize,
        q: &[*const f32; Q],
        state: &mut State<Q>,
    ) {
        let dim = self.step.layout.dim;
        let keys = self.step.layout.keys(self.tile.head);
        let float = self.step.layout.float.bytes();
        let ahead = page.wrapping_add(self.step.layout.values(self.tile.head) * float);
        for block in 0..count.div_ceil(LANES) {
            // Two sums a query: the next addition need not wait for the last.
            let mut acc = [[S::splat(0.0); 2]; Q];
            for d in (0..dim).step_by(2) {
                // The values are as large as the keys, and are next.
                prefetch(ahead.wrapping_add((block * dim + d) * LANES * float));
                for odd in 0..2 {
                    let place = keys + (block * dim + d + odd) * LANES;
                    let key = number::<S, HALF>(page, place);
                    for query in 0..Q {
                        let x = S::splat(*q[query].add(d + odd));
                        acc[query][odd] = S::fma(key, x, acc[query][odd]);
                    }
                }
            }
            for query in 0..Q {
                let sum = S::add(acc[query][0], acc[query][1]);
                S::store(state.scores[query].as_mut_ptr().add(block * LANES), sum);
            }
        }
    }

    /// `acc[query] += scores[query][position] * v[position]`; asks for the keys of the next page.
    ///
    /// # Safety
    /// `page` is a whole page, `state` has scores for `count` positions; `next` need not exist.
    #[inline(always)]
    unsafe fn mix<S: Simd, const HALF: bool, const Q: usize>(
        &self,
        page: *const u8,
        next: *const u8,
        count: usize,
        state: &mut State<Q>,
    ) {
        let wide = self.step.layout.value_dim();
        let values = self.step.layout.values(self.tile.head);
        let float = self.step.layout.float.bytes();
        let ahead = next.wrapping_add(self.step.layout.keys(self.tile.head) * float);
        for d in (0..wide).step_by(2 * LANES) {
            let both = d + LANES < wide;
            let second = if both { d + LANES } else { d };
            let mut acc = [[S::splat(0.0); 2]; Q];
            for query in 0..Q {
                let from = state.acc.as_ptr().add(query * wide);
                acc[query] = [S::load(from.add(d)), S::load(from.add(second))];
            }
            for position in 0..count {
                let row = values + position * wide;
                prefetch(ahead.wrapping_add((position * wide + d) * float));
                let value =
                    [number::<S, HALF>(page, row + d), number::<S, HALF>(page, row + second)];
                for query in 0..Q {
                    let weight = S::splat(state.scores[query][position]);
                    acc[query][0] = S::fma(value[0], weight, acc[query][0]);
                    acc[query][1] = S::fma(value[1], weight, acc[query][1]);
                }
            }
            for query in 0..Q {
                let to = state.acc.as_mut_ptr().add(query * wide);
                S::store(to.add(d), acc[query][0]);
                S::store(to.add(second), acc[query][1]);
            }
        }
    }
}

/// 16 numbers of a page.
///
/// # Safety
/// The machine has S's level, and 16 numbers of the page's type lie from `place` on.
#[inline(always)]
unsafe fn number<S: Simd, const HALF: bool>(page: *const u8, place: usize) -> S::F {
    match HALF {
        true => S::load_f16(page.cast::<u16>().add(place)),
        false => S::load(page.cast::<f32>().add(place)),
    }
}

/// The softmax so far, and what it has weighed.
struct State<const Q: usize> {
    highest: [f32; Q],
    total: [f32; Q],
    /// `[query][dim]`
    acc: Vec<f32>,
    scores: [[f32; PAGE]; Q],
}

impl<const Q: usize> State<Q> {
    /// Makes of the scores of a page weights beside those of the pages before.
    ///
    /// # Safety
    /// The machine has S's level; scores behind `count` are minus infinity up to a multiple of 16.
    #[inline(always)]
    unsafe fn soften<S: Simd>(&mut self, count: usize, wide: usize) {
        for query in 0..Q {
            let scores = self.scores[query].as_mut_ptr();
            let mut peak = S::splat(f32::NEG_INFINITY);
            for place in (0..count).step_by(LANES) {
                peak = S::max(peak, S::load(scores.add(place)));
            }
            let before = self.highest[query];
            let highest = before.max(S::largest(peak));
            if highest == f32::NEG_INFINITY {
                // Nothing is seen yet: minus infinity less itself would be NaN.
                self.scores[query] = [0.0; PAGE];
                continue;
            }
            if highest > before {
                let fade = (before - highest).exp();
                self.highest[query] = highest;
                self.total[query] *= fade;
                for acc in &mut self.acc[query * wide..][..wide] {
                    *acc *= fade;
                }
            }
            let highest = S::splat(highest);
            let mut total = S::splat(0.0);
            for place in (0..count).step_by(LANES) {
                let weight = S::exp(S::sub(S::load(scores.add(place)), highest));
                S::store(scores.add(place), weight);
                total = S::add(total, weight);
            }
            self.total[query] += S::sum(total);
        }
    }
}
