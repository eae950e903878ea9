//! Attention over the caches of the sequences in a step.
//!
//! Keys and values are kept in f16 (f32 in an f32 checkpoint), in pages of 64 positions. Sixteen
//! positions of a key lie side by side, so that their scores come out in one vector's lanes. The
//! queries of one key head share every key and value that is read; the softmax is made on the
//! way, page by page (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).

use super::float::Float;
use super::rows::{load_partial, norm_factor};
use super::simd::{Kernel, LANES, Simd, prefetch};
use super::tensor::{SendPtr, Tensor};
use super::{AttentionWeights, Cpu, Page, Segment, lock};
use crate::error::{Error, Result};
use crate::runtime::memory;
use crate::runtime::metrics;
use crate::spec::{AttentionSpec, NormSpec, Rope};
use safetensors::tensor::Dtype;
use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

/// The positions of a page.
const PAGE: usize = 64;
/// The rows of a prefill that are one tile.
const ROWS: usize = 16;

/// Keys and values of one sequence in one layer. Forks share pages until one of them writes there.
#[derive(Default)]
pub struct Cache {
    pages: Vec<Arc<Memory>>,
}

/// A page's.
struct Memory {
    bytes: Vec<u8>,
    gauge: metrics::Share,
}

impl Drop for Memory {
    fn drop(&mut self) {
        memory::give_back(self.gauge.amount());
    }
}

fn no_memory(bytes: usize) -> Error {
    Error::OutOfMemory(format!("no {bytes} bytes for keys and values"))
}

impl Memory {
    fn new(size: usize) -> Result<Self> {
        let mut bytes = vec![];
        bytes.try_reserve_exact(size).map_err(|_| no_memory(size))?;
        bytes.resize(size, 0);
        let mut gauge = metrics::Share::of(&metrics::CPU_BYTES);
        gauge.set(size);
        Ok(Self { bytes, gauge })
    }
}

impl Cache {
    pub fn fork(&self, positions: usize) -> Self {
        let pages = positions.div_ceil(PAGE).min(self.pages.len());
        Self { pages: self.pages[..pages].to_vec() }
    }

    pub fn pages(&self) -> Vec<Page> {
        let page =
            |page: &Arc<Memory>| Page { id: Arc::as_ptr(page) as usize, bytes: page.bytes.len() };
        self.pages.iter().map(page).collect()
    }

    /// Makes these positions its own to write to.
    pub fn reserve(&mut self, positions: Range<usize>, layout: &Layout) -> Result<()> {
        let pages = positions.start / PAGE..positions.end.div_ceil(PAGE);
        let new = pages.end.saturating_sub(self.pages.len());
        let there = self.pages.get(pages.start..pages.end.min(self.pages.len()));
        let shared = |page: &&Arc<Memory>| Arc::strong_count(page) > 1;
        let copied = there.map_or(0, |pages| pages.iter().filter(shared).count());
        let bytes = (new + copied).saturating_mul(layout.page_bytes());
        if bytes > 0 && !memory::take(bytes) {
            return Err(no_memory(bytes));
        }
        self.make(pages, new, layout)
    }

    fn make(&mut self, pages: Range<usize>, new: usize, layout: &Layout) -> Result<()> {
        let size = layout.page_bytes();
        self.pages.try_reserve(new).map_err(|_| no_memory(new.saturating_mul(size)))?;
        for page in pages {
            match self.pages.get_mut(page) {
                None => self.pages.push(Arc::new(Memory::new(size)?)),
                Some(shared) if Arc::strong_count(shared) > 1 => {
                    let mut own = Memory::new(size)?;
                    own.bytes.copy_from_slice(&shared.bytes);
                    *shared = Arc::new(own);
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    /// Pages that are shared are read only.
    fn pointers(&mut self) -> Pages {
        let pointer = |page: &mut Arc<Memory>| match Arc::get_mut(page) {
            Some(own) => own.bytes.as_mut_ptr(),
            None => page.bytes.as_ptr().cast_mut(),
        };
        Pages(self.pages.iter_mut().map(pointer).collect())
    }
}

/// A page: keys `[head][16 positions][dim][position]`, then values `[head][position][dim]`, the
/// latter with room for whole vectors.
#[derive(Clone, Copy)]
pub struct Layout {
    heads: usize,
    dim: usize,
    float: Float,
}

impl Layout {
    fn value_dim(&self) -> usize {
        self.dim.next_multiple_of(LANES)
    }

    fn page_bytes(&self) -> usize {
        self.heads * PAGE * (self.dim + self.value_dim()) * self.float.bytes()
    }

    /// Where, in numbers, the keys of a head begin.
    fn keys(&self, head: usize) -> usize {
        head * PAGE * self.dim
    }

    fn values(&self, head: usize) -> usize {
        (self.heads * self.dim + head * self.value_dim()) * PAGE
    }
}

/// The pages of a segment, for threads that write to different positions.
struct Pages(Vec<*mut u8>);

// SAFETY: a position is written by one thread, and read only once all are written.
unsafe impl Sync for Pages {}

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

/// cos and sin of every row of a step: `[rows, dim / 2]` each. Layers of a step share them.
#[derive(Default)]
pub struct Rotation {
    rope: Option<Rope>,
    positions: Vec<Range<usize>>,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rotation {
    /// The positions of each segment.
    fn prepare(&mut self, attention: &Attention, positions: Vec<Range<usize>>) {
        let rope = &attention.spec.rope;
        if self.positions == positions && self.rope.as_ref() == Some(rope) {
            return;
        }
        let amplitude = f64::from(rope.amplitude());
        self.cos.clear();
        self.sin.clear();
        for segment in &positions {
            let frequencies = attention.frequencies(segment.end);
            for position in segment.clone() {
                for frequency in frequencies.iter() {
                    let (sin, cos) = (position as f64 * frequency).sin_cos();
                    self.cos.push((amplitude * cos) as f32);
                    self.sin.push((amplitude * sin) as f32);
                }
            }
        }
        self.positions = positions;
        self.rope = Some(rope.clone());
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

/// Norms and rotates the heads of q and k in `rows`, and puts k and v into the cache.
struct Prepare<'a> {
    step: &'a Step<'a>,
    rows: Range<usize>,
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

struct Attend<'a> {
    step: &'a Step<'a>,
    tile: &'a Tile,
    out: SendPtr,
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
        let mut limits = [0; Q];
        for (place, (row, head)) in queries.into_iter().enumerate() {
            q[place] = step.q.at((segment.rows.start + row) * step.stride + head * dim);
            limits[place] = segment.start + row + 1;
        }
        // The rows ascend, so the last query sees the most.
        let end = limits[Q - 1];
        let mut state = State::<Q> {
            highest: [f32::NEG_INFINITY; Q],
            total: [0.0; Q],
            acc: vec![0.0; Q * step.layout.value_dim()],
            scores: [[0.0; PAGE]; Q],
        };
        for page in 0..end.div_ceil(PAGE) {
            let base = step.pages[self.tile.segment].0[page];
            let first = page * PAGE;
            let count = PAGE.min(end - first);
            self.score::<S, HALF, Q>(base, count, &q, &mut state);
            for (scores, limit) in state.scores.iter_mut().zip(limits) {
                let seen = limit.saturating_sub(first).min(PAGE);
                scores[seen..count.next_multiple_of(LANES)].fill(f32::NEG_INFINITY);
            }
            state.soften::<S>(count, step.layout.value_dim());
            let next = step.pages[self.tile.segment].0.get(page + 1).copied();
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
