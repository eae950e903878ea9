//! What a handle holds until it is unloaded.

use bombus::error::{Error, Result};
use std::sync::{Arc, Mutex, PoisonError, Weak};

pub struct Held<T> {
    /// what it is called
    what: &'static str,
    value: Mutex<Option<Arc<T>>>,
    /// what is taken, as long as others have it
    taken: Mutex<Weak<T>>,
}

impl<T> Held<T> {
    pub fn new(what: &'static str, value: T) -> Self {
        Self { what, value: Mutex::new(Some(Arc::new(value))), taken: Mutex::default() }
    }

    pub fn get(&self) -> Result<Arc<T>> {
        let value = self.value.lock().unwrap_or_else(PoisonError::into_inner).clone();
        value.ok_or(Error::Unloaded(self.what))
    }

    /// Nobody gets it any more; whoever has it keeps it. `None` once nobody has it.
    pub fn take(&self) -> Option<Arc<T>> {
        let mut value = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        match value.take() {
            Some(value) => {
                *taken = Arc::downgrade(&value);
                Some(value)
            }
            None => taken.upgrade(),
        }
    }
}
