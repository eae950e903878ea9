//! Who may launch the kernel for steps. Its blocks wait for each other, so all of them must find room on
//! the card: two models' launches at once might each have half, and wait for ever.

use crate::backend::ticket_lock::{TicketGuard, TicketLock};
use crate::error::Result;
use std::sync::{Mutex, MutexGuard, PoisonError};

static LAUNCHES: Launches = Launches::new();

struct Launches {
    line: TicketLock,
    state: Mutex<State>,
}

struct State {
    /// The model that may launch, and its place in the line.
    owner: Option<(usize, TicketGuard)>,
    /// What it has launched that may not be done.
    launches: usize,
    /// How often the owner changed.
    reign: usize,
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
        let state = State { owner: None, launches: 0, reign: 0 };
        Self { line: TicketLock::new(), state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(
        &'static self,
        owner: usize,
        finish: impl FnOnce() -> Result<()>,
    ) -> Result<LaunchGuard> {
        let mut state = self.state();
        if let Some((same, place)) = &state.owner
            && *same == owner
        {
            if !place.is_wanted() {
                state.launches += 1;
                return Ok(LaunchGuard { launches: self, reign: state.reign });
            }
            drop(state);
            finish()?;
            state = self.state();
            state.free();
        }
        drop(state);
        let place = self.line.take();
        let mut state = self.state();
        state.owner = Some((owner, place));
        state.launches = 1;
        Ok(LaunchGuard { launches: self, reign: state.reign })
    }
}

impl State {
    fn free(&mut self) {
        self.owner = None;
        self.launches = 0;
        self.reign += 1;
    }
}

impl Drop for LaunchGuard {
    fn drop(&mut self) {
        let mut state = self.launches.state();
        if state.reign == self.reign {
            state.launches -= 1;
            if state.launches == 0 {
                state.free();
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
        assert!(LAUNCHES.state().owner.is_none());
    }
}
