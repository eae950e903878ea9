//! Activations: rows of f32.

use super::lock;
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// `[rows, width]`, row by row. Its memory goes back to where it came from.
pub struct Tensor {
    pub rows: usize,
    pub width: usize,
    /// The numbers from one row to the next.
    pub stride: usize,
    data: Vec<f32>,
    home: Spare,
}

/// Memory of past activations, for the next ones: a large allocation costs page faults.
#[derive(Clone, Default)]
pub struct Spare(Arc<Mutex<Vec<Vec<f32>>>>);

/// More than this many are not kept: a layer has no more alive at once.
const KEPT: usize = 8;

impl Spare {
    /// Its values are whatever was there.
    pub fn tensor(&self, rows: usize, width: usize) -> Tensor {
        // Rows at multiples of 4 KB would all fall into the same few lines of the caches.
        let stride = if rows > 1 { width.next_multiple_of(16) + 16 } else { width };
        let size = rows * stride;
        let mut spare = lock(&self.0);
        let best = (0..spare.len())
            .filter(|&place| spare[place].capacity() >= size)
            .min_by_key(|&place| spare[place].capacity());
        let mut data = best.map(|place| spare.swap_remove(place)).unwrap_or_default();
        data.resize(size, 0.0);
        Tensor { rows, width, stride, data, home: self.clone() }
    }

    fn keep(&self, data: Vec<f32>) {
        let mut spare = lock(&self.0);
        spare.push(data);
        if spare.len() > KEPT {
            let smallest = (0..spare.len()).min_by_key(|&place| spare[place].capacity());
            spare.swap_remove(smallest.unwrap_or(0));
        }
    }
}

impl Tensor {
    pub fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.stride..][..self.width]
    }

    pub fn data_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }
}

impl Drop for Tensor {
    fn drop(&mut self) {
        self.home.keep(std::mem::take(&mut self.data));
    }
}

/// A pointer that threads may share, each writing where no other does.
#[derive(Clone, Copy)]
pub struct SendPtr(pub *mut f32);

// SAFETY: whoever writes through it says why nobody else writes or reads there.
unsafe impl Sync for SendPtr {}
// SAFETY: as above.
unsafe impl Send for SendPtr {}

impl SendPtr {
    /// # Safety
    /// As for `pointer::add`; a method, so that closures take all of `self`.
    pub unsafe fn at(self, offset: usize) -> *mut f32 {
        // SAFETY: the caller's.
        unsafe { self.0.add(offset) }
    }
}

/// Some columns of an output, whose rows are `stride` numbers apart.
#[derive(Clone)]
pub struct Target {
    pub y: SendPtr,
    pub range: Range<usize>,
    pub stride: usize,
}

impl Target {
    /// # Safety
    /// `row` and `column` are within the output that `y` points to.
    #[inline(always)]
    pub unsafe fn at(&self, row: usize, column: usize) -> *mut f32 {
        self.y.at(row * self.stride + column)
    }
}
