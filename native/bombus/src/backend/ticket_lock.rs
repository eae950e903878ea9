//! A lock that serves whoever comes first: a mutex's waiters may be overtaken for ever.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

pub struct TicketLock {
    tickets: Mutex<Tickets>,
    changed: Condvar,
}

struct Tickets {
    /// to hand out next
    next: u64,
    /// that holds the lock, or may take it
    served: u64,
}

/// The lock, given back when it is dropped.
pub struct TicketGuard(&'static TicketLock);

impl TicketLock {
    pub const fn new() -> Self {
        let tickets = Mutex::new(Tickets { next: 0, served: 0 });
        Self { tickets, changed: Condvar::new() }
    }

    fn tickets(&self) -> MutexGuard<'_, Tickets> {
        // What is inside is whole at every moment.
        self.tickets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until all who came before have had it.
    pub fn take(&'static self) -> TicketGuard {
        let mut tickets = self.tickets();
        let own = tickets.next;
        tickets.next += 1;
        while tickets.served != own {
            tickets = self.changed.wait(tickets).unwrap_or_else(PoisonError::into_inner);
        }
        TicketGuard(self)
    }
}

impl TicketGuard {
    /// Whether somebody waits for this one.
    #[cfg(feature = "mlx")]
    pub fn is_wanted(&self) -> bool {
        let tickets = self.0.tickets();
        tickets.next > tickets.served + 1
    }
}

impl Drop for TicketGuard {
    fn drop(&mut self) {
        self.0.tickets().served += 1;
        self.0.changed.notify_all();
    }
}
