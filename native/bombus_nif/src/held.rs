//! What a handle holds until it is unloaded.

use bombus::error::{Error, Result};
use std::sync::{Arc, Mutex, PoisonError};

pub struct Held<T> {
    /// what it is called
    what: &'static str,
    value: Mutex<Option<Arc<T>>>,
}

impl<T> Held<T> {
    pub fn new(what: &'static str, value: T) -> Self {
        Self { what, value: Mutex::new(Some(Arc::new(value))) }
    }

    pub fn get(&self) -> Result<Arc<T>> {
        let value = self.value.lock().unwrap_or_else(PoisonError::into_inner).clone();
        value.ok_or(Error::Unloaded(self.what))
    }

    /// Nobody gets it any more; whoever has it keeps it.
    pub fn take(&self) -> Option<Arc<T>> {
        self.value.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
