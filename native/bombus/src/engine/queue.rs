//! Who may wait: the model's queue, and the shares that some requests have in it.

use crate::error::{Error, Result};
use crate::scheduler::Limits;
use crate::sequence::Share;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

/// How many requests wait, of how many that may.
#[derive(Clone)]
pub struct Queue {
    waiting: Arc<AtomicUsize>,
    max: usize,
}

/// A place in a queue, given back when the request runs or ends.
pub struct Place(Queue);

impl Queue {
    pub fn new(max: usize) -> Self {
        Self { waiting: Arc::default(), max }
    }

    /// An error at once where all places are taken.
    pub fn place(&self) -> Result<Place> {
        let one_more = |waiting| (waiting < self.max).then_some(waiting + 1);
        let taken = self.waiting.fetch_update(Relaxed, Relaxed, one_more);
        taken.map(|_| Place(self.clone())).map_err(|_| Error::Overloaded(self.max))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Relaxed);
    }
}

/// Requests with limits of their own, such as those of one serving, within the model's.
pub struct Group {
    id: u64,
    limits: Limits,
    queue: Queue,
}

impl Group {
    pub fn new(limits: Limits) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let queue = Queue::new(limits.max_queue);
        Self { id: NEXT.fetch_add(1, Relaxed), limits, queue }
    }

    pub(super) fn place(&self) -> Result<Place> {
        self.queue.place()
    }

    pub(super) fn share(&self) -> Share {
        let Limits { max_batch_size, prefill_chunk, .. } = self.limits;
        Share { id: self.id, max_batch_size, prefill_chunk }
    }
}
