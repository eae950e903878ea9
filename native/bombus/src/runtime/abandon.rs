//! Work that nobody waits for any more, such as a load whose caller is gone: it ends at the next
//! place that asks.

use crate::error::{Error, Result};
use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

thread_local! {
    static CURRENT: RefCell<Abandoned> = RefCell::default();
}

/// The process exits: nobody waits for anything.
static ALL: AtomicBool = AtomicBool::new(false);

/// Whether some work has been abandoned.
#[derive(Clone, Default)]
pub struct Abandoned(Arc<AtomicBool>);

impl Abandoned {
    /// That of the work which this thread does.
    pub fn current() -> Self {
        CURRENT.with_borrow(Clone::clone)
    }

    pub fn set(&self) {
        self.0.store(true, Relaxed);
    }

    /// Does work on this thread that may be abandoned.
    pub fn scope<T>(&self, work: impl FnOnce() -> T) -> T {
        let before = CURRENT.replace(self.clone());
        let done = work();
        CURRENT.set(before);
        done
    }
}

/// Ends all work that asks.
pub fn all() {
    ALL.store(true, Relaxed);
}

/// Fails where nobody waits any more for what this thread does.
pub fn check() -> Result<()> {
    match ALL.load(Relaxed) || CURRENT.with_borrow(|current| current.0.load(Relaxed)) {
        true => Err(Error::Stopped),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_work_that_was_abandoned_ends() {
        let (one, other) = (Abandoned::default(), Abandoned::default());
        one.set();
        assert!(check().is_ok());
        one.scope(|| {
            assert!(check().is_err());
            other.scope(|| assert!(check().is_ok()));
            let current = Abandoned::current();
            let thread = std::thread::spawn(move || current.scope(check));
            assert!(thread.join().unwrap().is_err());
        });
        assert!(check().is_ok());
    }
}
