//! Keys and values of a sequence in one layer, in pages that forks share until one writes there.

use super::super::float::Float;
use super::super::simd::LANES;
use crate::backend::Page;
use crate::error::{Error, Result};
use crate::runtime::memory;
use crate::runtime::metrics;
use std::ops::Range;
use std::sync::Arc;

/// The positions of a page.
pub const PAGE: usize = 64;

/// Keys and values of one sequence in one layer. Forks share pages until one of them writes there.
#[derive(Default)]
pub struct Cache {
    /// The number of the first page: those before it are out of the window's sight.
    first: usize,
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
        let pages = positions.div_ceil(PAGE).saturating_sub(self.first).min(self.pages.len());
        Self { first: self.first, pages: self.pages[..pages].to_vec() }
    }

    pub fn kept_from(&self) -> usize {
        self.first * PAGE
    }

    pub fn pages(&self) -> Vec<Page> {
        let page =
            |page: &Arc<Memory>| Page { id: Arc::as_ptr(page) as usize, bytes: page.bytes.len() };
        self.pages.iter().map(page).collect()
    }

    /// Lets go of the pages before the one with this position.
    pub fn forget(&mut self, before: usize) {
        let gone = (before / PAGE).saturating_sub(self.first).min(self.pages.len());
        self.pages.drain(..gone);
        self.first += gone;
    }

    /// Makes these positions its own to write to.
    pub fn reserve(&mut self, positions: Range<usize>, layout: &Layout) -> Result<()> {
        let page = |number: usize| number.saturating_sub(self.first);
        let pages = page(positions.start / PAGE)..page(positions.end.div_ceil(PAGE));
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

    /// `pages`: counted from the first that is there
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
    pub fn pointers(&mut self) -> Pages {
        let pointer = |page: &mut Arc<Memory>| match Arc::get_mut(page) {
            Some(own) => own.bytes.as_mut_ptr(),
            None => page.bytes.as_ptr().cast_mut(),
        };
        Pages { first: self.first, pages: self.pages.iter_mut().map(pointer).collect() }
    }
}

/// A page: keys `[head][16 positions][dim][position]`, then values `[head][position][dim]`, the
/// latter with room for whole vectors.
#[derive(Clone, Copy)]
pub struct Layout {
    pub heads: usize,
    pub dim: usize,
    pub float: Float,
}

impl Layout {
    pub fn value_dim(&self) -> usize {
        self.dim.next_multiple_of(LANES)
    }

    fn page_bytes(&self) -> usize {
        self.heads * PAGE * (self.dim + self.value_dim()) * self.float.bytes()
    }

    /// Where, in numbers, the keys of a head begin.
    pub fn keys(&self, head: usize) -> usize {
        head * PAGE * self.dim
    }

    pub fn values(&self, head: usize) -> usize {
        (self.heads * self.dim + head * self.value_dim()) * PAGE
    }
}

/// The pages of a segment, for threads that write to different positions.
pub struct Pages {
    first: usize,
    pages: Vec<*mut u8>,
}

impl Pages {
    /// The page of this number, counted from the sequence's first.
    pub fn get(&self, number: usize) -> Option<*mut u8> {
        self.pages.get(number.checked_sub(self.first)?).copied()
    }

    /// The same, of one that is there.
    #[inline(always)]
    pub fn page(&self, number: usize) -> *mut u8 {
        self.pages[number - self.first]
    }
}

// SAFETY: a position is written by one thread, and read only once all are written.
unsafe impl Sync for Pages {}
