//! What an engine tells of its steps.

use std::time::Duration;

/// A step that is done.
#[derive(Clone, Debug)]
pub struct Step {
    /// Sequences that took part, of those that run.
    pub sequences: usize,
    /// Tokens that were computed.
    pub rows: usize,
    /// Requests that wait for a place.
    pub waiting: usize,
    /// Bytes of the running sequences' keys and values, and of those kept for others.
    pub kv_bytes: usize,
    pub prefix_bytes: usize,
    /// From its beginning until its tokens were there.
    pub duration: Duration,
}

/// Hears of every step, on the engine's thread; false ends that.
pub type Monitor = Box<dyn FnMut(Step) -> bool + Send>;
