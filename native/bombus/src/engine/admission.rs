//! Who may come in: as many as run together and as many as may wait, of a model and of a group.

use crate::engine::scheduler::Limits;
use crate::engine::sequence::GroupLimits;
use crate::error::{Error, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};

/// How many requests there are, of how many that may be.
#[derive(Clone)]
pub struct AdmissionLimit {
    taken: Arc<AtomicUsize>,
    max: usize,
}

/// A permit, given back when the request ends.
pub struct Permit(AdmissionLimit);

impl AdmissionLimit {
    pub fn new(limits: &Limits) -> Self {
        let max = limits.max_batch_size.saturating_add(limits.max_queue);
        Self { taken: Arc::default(), max }
    }

    /// How many requests run or wait.
    pub fn taken(&self) -> usize {
        self.taken.load(Relaxed)
    }

    /// An error at once where all permits are taken.
    pub fn permit(&self) -> Result<Permit> {
        let one_more = |taken| (taken < self.max).then_some(taken + 1);
        let taken = self.taken.fetch_update(Relaxed, Relaxed, one_more);
        taken.map(|_| Permit(self.clone())).map_err(|_| Error::Overloaded(self.max))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Relaxed);
    }
}

/// Requests with limits of their own, such as those of one serving, within the model's.
pub struct Group {
    id: u64,
    limits: Limits,
    admission: AdmissionLimit,
    closed: AtomicBool,
}

impl Group {
    pub fn new(limits: Limits) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let admission = AdmissionLimit::new(&limits);
        Self { id: NEXT.fetch_add(1, Relaxed), limits, admission, closed: AtomicBool::new(false) }
    }

    /// Takes no more requests.
    pub fn close(&self) {
        self.closed.store(true, Relaxed);
    }

    pub(super) fn permit(&self) -> Result<Permit> {
        if self.closed.load(Relaxed) {
            return Err(Error::Stopping);
        }
        self.admission.permit()
    }

    pub(super) fn limits(&self) -> GroupLimits {
        let Limits { max_batch_size, prefill_chunk, .. } = self.limits;
        GroupLimits { id: self.id, max_batch_size, prefill_chunk }
    }
}
