//! Keys and values on the card, in pages of 64 positions of all layers, which sequences share.
//!
//! MLX does not know of them: kernels get their addresses. What is written in one step is there for the
//! next, since MLX's steps follow each other on their stream.

use super::PagedAttention;
use super::kernel::{Kernel, Launch, Source};
use super::layout::PAGE_POSITIONS;
use crate::backend::{Page as Block, arrays};
use crate::error::{Error, Result};
use mlx_rs::{Array, Dtype, ops, transforms};
use std::cell::RefCell;
use std::iter::repeat_n;
use std::ops::Range;
use std::rc::Rc;

/// Bytes that are asked of MLX at once, about.
const SLAB: usize = 64 << 20;

/// Where arrays lie on the card.
pub struct Addresses(Kernel);

impl Addresses {
    pub fn new() -> Result<Self> {
        Ok(Self(Kernel::new(&Source {
            name: c"bombus_address",
            inputs: &[c"x"],
            outputs: &[c"address"],
            header: "",
            body: "address[0] = reinterpret_cast<uint64_t>(x);",
            contiguous: true,
            shared: 0,
        })?))
    }

    /// Not yet computed, `[1]`, as `uint64`. The array must be computed, and be kept by whoever uses the
    /// address.
    pub fn of(&self, array: &Array) -> Result<Array> {
        // One type for all: the kernel is compiled for each.
        let words = array.flatten(None, None)?.view::<u32>()?;
        let mut outputs = self.0.run(&Launch {
            inputs: &[&words],
            outputs: &[(&[1], Dtype::Uint64)],
            blocks: 1,
            threads: 1,
            constants: &[],
        })?;
        Ok(outputs.swap_remove(0))
    }
}

/// All pages of a model.
pub struct Pool {
    addresses: Rc<Addresses>,
    copy: Kernel,
    page_bytes: usize,
    free: RefCell<Vec<u64>>,
    slabs: RefCell<Vec<Array>>,
}

struct Page {
    address: u64,
    pool: Rc<Pool>,
}

impl Drop for Page {
    fn drop(&mut self) {
        self.pool.free.borrow_mut().push(self.address);
    }
}

impl Pool {
    pub fn new(addresses: Rc<Addresses>, page_bytes: usize) -> Result<Rc<Self>> {
        let copy = Kernel::new(&Source {
            name: c"bombus_copy_page",
            inputs: &[c"pages"],
            outputs: &[c"done"],
            header: "",
            body: "const uint4* from = reinterpret_cast<const uint4*>(pages[0]);\n\
                   uint4* to = reinterpret_cast<uint4*>(pages[1]);\n\
                   const size_t all = pages[2] / 16;\n\
                   for (size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < all; i += gridDim.x * blockDim.x)\n\
                     to[i] = from[i];",
            contiguous: true,
            shared: 0,
        })?;
        Ok(Rc::new(Self {
            addresses,
            copy,
            page_bytes,
            free: RefCell::default(),
            slabs: RefCell::default(),
        }))
    }

    fn page(self: &Rc<Self>) -> Result<Page> {
        if self.free.borrow().is_empty() {
            self.grow()?;
        }
        let address = self.free.borrow_mut().pop();
        let address = address.ok_or_else(|| Error::Backend("no page of keys and values".into()))?;
        Ok(Page { address, pool: self.clone() })
    }

    fn grow(&self) -> Result<()> {
        let pages = (SLAB / self.page_bytes).clamp(1, 64);
        let words = self.page_bytes / 4 * pages;
        let shape = [i32::try_from(words).map_err(|_| Error::OutOfMemory(format!("{words}")))?];
        let slab = ops::zeros::<u32>(&shape)?;
        transforms::eval([&slab])?;
        let address = self.addresses.of(&slab)?;
        transforms::eval([&address])?;
        let first = arrays::values::<u64>(&address)?[0];
        self.slabs.borrow_mut().push(slab);
        let pages = (0..pages).rev().map(|page| first + (page * self.page_bytes) as u64);
        self.free.borrow_mut().extend(pages);
        Ok(())
    }

    fn copy(self: &Rc<Self>, from: &Page) -> Result<Page> {
        let to = self.page()?;
        let pages = Array::from_slice(&[from.address, to.address, self.page_bytes as u64], &[3]);
        let done = self.copy.run(&Launch {
            inputs: &[&pages],
            outputs: &[(&[1], Dtype::Uint32)],
            blocks: 64,
            threads: 256,
            constants: &[],
        })?;
        // What comes later does not wait for this by its inputs, but by the order of the stream.
        transforms::async_eval(&done)?;
        Ok(to)
    }
}

/// The pages of one sequence. Forks share them until one writes there.
pub struct Sequence {
    pub attention: Rc<PagedAttention>,
    pool: Rc<Pool>,
    /// Pages that it has let go of, before those that it has: no layer of the model sees them.
    unseen: usize,
    pages: Vec<Rc<Page>>,
    /// `plan` for this start, as it was last made
    plan: RefCell<Option<(usize, Array)>>,
}

impl Sequence {
    pub fn new(attention: &Rc<PagedAttention>, pool: &Rc<Pool>) -> Self {
        let (attention, pool) = (attention.clone(), pool.clone());
        Self { attention, pool, unseen: 0, pages: vec![], plan: RefCell::default() }
    }

    pub fn fork(&self, positions: usize) -> Self {
        let pages = positions.div_ceil(PAGE_POSITIONS).saturating_sub(self.unseen);
        Self {
            unseen: self.unseen,
            pages: self.pages[..pages.min(self.pages.len())].to_vec(),
            ..Self::new(&self.attention, &self.pool)
        }
    }

    /// The first position that it has.
    pub fn kept_from(&self) -> usize {
        self.unseen * PAGE_POSITIONS
    }

    pub fn pages(&self) -> Vec<Block> {
        let bytes = self.pool.page_bytes;
        self.pages.iter().map(|page| Block { id: page.address as usize, bytes }).collect()
    }

    /// Makes these positions its own to write to, and lets go of what none from the first on sees.
    pub fn reserve(&mut self, positions: Range<usize>) -> Result<()> {
        self.let_go(positions.start);
        if positions.start < self.kept_from() {
            return Err(Error::Backend("a position before what a window has kept".into()));
        }
        for index in positions.start / PAGE_POSITIONS..positions.end.div_ceil(PAGE_POSITIONS) {
            match self.pages.get(index - self.unseen) {
                None => self.pages.push(Rc::new(self.pool.page()?)),
                Some(shared) if Rc::strong_count(shared) > 1 => {
                    self.pages[index - self.unseen] = Rc::new(self.pool.copy(shared)?);
                    self.plan.take();
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    fn let_go(&mut self, position: usize) {
        let Some(window) = self.attention.window_of_all() else { return };
        let unseen = unseen_pages(position, window);
        let more = unseen.saturating_sub(self.unseen).min(self.pages.len());
        if more > 0 {
            self.pages.drain(..more);
            self.unseen += more;
            self.plan.take();
        }
    }

    /// 0 for those that it has let go of.
    pub fn addresses(&self) -> impl Iterator<Item = u64> {
        repeat_n(0, self.unseen).chain(self.pages.iter().map(|page| page.address))
    }

    /// `start`, and the pages, for `append.cu`: the same array for all layers.
    pub fn plan(&self, start: usize) -> Array {
        let mut plan = self.plan.borrow_mut();
        let words = 1 + (self.unseen + self.pages.len()) as i32;
        match &*plan {
            Some((same, array)) if *same == start && array.dim(0) == words => array.clone(),
            _ => {
                let words: Vec<u64> = [start as u64].into_iter().chain(self.addresses()).collect();
                let array = Array::from_slice(&words, &[words.len() as i32]);
                *plan = Some((start, array.clone()));
                array
            }
        }
    }
}

/// The pages at the beginning that no position from this one on sees, but for one, for texts that go on
/// from a little before the end. Their number changes where a new page begins: a step whose pages are
/// others than the last one's sends its whole plan.
fn unseen_pages(position: usize, window: usize) -> usize {
    let page = position / PAGE_POSITIONS * PAGE_POSITIONS;
    ((page + 1).saturating_sub(window) / PAGE_POSITIONS).saturating_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_let_go_of_behind_the_window_where_a_new_one_begins() {
        for window in [1, 63, 64, 65, 100, 4096] {
            for position in 0..10_000 {
                let unseen = unseen_pages(position, window);
                let first_seen = (position + 1).saturating_sub(window);
                // A page more than is seen stays, and not three.
                assert!(unseen == 0 || (unseen + 1) * PAGE_POSITIONS <= first_seen);
                assert!((unseen + 3) * PAGE_POSITIONS > first_seen, "{window} {position}");
                let changes = position > 0 && unseen != unseen_pages(position - 1, window);
                assert!(!changes || position % PAGE_POSITIONS == 0);
            }
        }
    }
}
