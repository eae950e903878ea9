//! Who may launch the kernel for steps. Its blocks wait for each other, so all of them must find room on
//! the card: two models' launches at once might each have half, and wait for ever.

use crate::error::Result;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

static LAUNCHES: Launches = Launches::new();

struct Launches {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// The model that may launch, and what it has launched that may not be done.
    owner: Option<usize>,
    launches: usize,
    /// How often the owner changed.
    reign: usize,
    /// The next to come, and the next to be served.
    last: usize,
    next: usize,
}

/// A launch that may not be done yet.
pub struct LaunchGuard {
    launches: &'static Launches,
    reign: usize,
}

/// Waits until `owner` may launch. Where it has launches under way and another waits, `finish` waits for
/// those first.
pub fn take(owner: usize, finish: impl FnOnce() -> Result<()>) -> Result<LaunchGuard> {
    LAUNCHES.take(owner, finish)
}

impl Launches {
    const fn new() -> Self {
        let state = State { owner: None, launches: 0, reign: 0, last: 0, next: 0 };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(
        &'static self,
        owner: usize,
        finish: impl FnOnce() -> Result<()>,
    ) -> Result<LaunchGuard> {
        let mut state = self.lock();
        if state.owner == Some(owner) {
            if state.last == state.next {
                state.launches += 1;
                return Ok(LaunchGuard { launches: self, reign: state.reign });
            }
            drop(state);
            finish()?;
            state = self.lock();
            self.free(&mut state);
        }
        let ticket = state.last;
        state.last += 1;
        while state.owner.is_some() || state.next != ticket {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.next += 1;
        state.owner = Some(owner);
        state.launches = 1;
        Ok(LaunchGuard { launches: self, reign: state.reign })
    }

    fn free(&self, state: &mut State) {
        state.owner = None;
        state.launches = 0;
        state.reign += 1;
        self.changed.notify_all();
    }
}

impl Drop for LaunchGuard {
    fn drop(&mut self) {
        let mut state = self.launches.lock();
        if state.reign == self.reign {
            state.launches -= 1;
            if state.launches == 0 {
                self.launches.free(&mut state);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    #[test]
    fn launches_of_two_owners_never_overlap() {
        static LAUNCHES: Launches = Launches::new();
        static OWNER: AtomicUsize = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for owner in 1..=3 {
                scope.spawn(move || {
                    let mut flying = None;
                    for step in 0..200 {
                        // As the engine: the next is launched before the last is read.
                        let finish = || {
                            OWNER.store(0, SeqCst);
                            Ok(())
                        };
                        let guard = LAUNCHES.take(owner, finish).unwrap();
                        let before = OWNER.swap(owner, SeqCst);
                        assert!(before == 0 || before == owner, "{before} beside {owner}");
                        std::thread::yield_now();
                        if step % 7 == 0 {
                            OWNER.store(0, SeqCst);
                            drop((flying.take(), guard));
                        } else {
                            flying = Some(guard);
                        }
                    }
                    OWNER.store(0, SeqCst);
                });
            }
        });
        assert!(LAUNCHES.lock().owner.is_none());
    }
}
