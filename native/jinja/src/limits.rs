//! What rendering may cost: a template comes with every model of the Hub, and nobody has read it.

use super::fault::{Fault, Outcome};
use std::cell::Cell;

/// How deep lists and objects may lie in each other.
pub const DEPTH: u32 = 256;
/// How deep expressions, blocks and macros may be evaluated in each other.
const LEVELS: u32 = 2_000;
/// The stack that these levels, and the parser's, fit on.
pub const STACK: usize = 64 << 20;
/// A long conversation takes some hundred steps a message.
const STEPS: u64 = 20_000_000;
const BYTES: u64 = 128 << 20;
/// What one byte of the conversation adds to them.
const STEPS_PER_BYTE: u64 = 8;
const BYTES_PER_BYTE: u64 = 32;
/// How many bytes are copied or read for one step.
const BYTES_PER_STEP: u64 = 32;

/// What is left of the steps and bytes of one rendering.
pub struct Limits {
    steps: Cell<u64>,
    bytes: Cell<u64>,
    level: Cell<u32>,
}

impl Limits {
    /// `input`: bytes of the conversation and its options
    pub fn new(input: usize) -> Self {
        let more = |each: u64| (input as u64).saturating_mul(each);
        Self {
            steps: Cell::new(STEPS.saturating_add(more(STEPS_PER_BYTE))),
            bytes: Cell::new(BYTES.saturating_add(more(BYTES_PER_BYTE))),
            level: Cell::new(0),
        }
    }

    /// For a look at what a template does with a short conversation.
    pub fn short() -> Self {
        Self { steps: Cell::new(STEPS / 20), bytes: Cell::new(BYTES / 20), level: Cell::new(0) }
    }

    /// Counts work, before it is done.
    pub fn steps(&self, count: usize) -> Outcome<()> {
        let left = self.steps.get().checked_sub(count as u64);
        self.steps.set(left.unwrap_or(0));
        left.map(drop).ok_or_else(|| Fault::new("it takes too many steps"))
    }

    /// Counts the bytes of a text that is read.
    pub fn read(&self, bytes: usize) -> Outcome<()> {
        self.steps(1 + bytes / BYTES_PER_STEP as usize)
    }

    /// Counts memory, before it is taken.
    pub fn bytes(&self, count: usize) -> Outcome<()> {
        self.read(count)?;
        let left = self.bytes.get().checked_sub(count as u64);
        self.bytes.set(left.unwrap_or(0));
        left.map(drop).ok_or_else(|| Fault::new("it makes too much text"))
    }

    /// Goes one level deeper.
    pub fn descend(&self) -> Outcome<()> {
        self.steps(1)?;
        if self.level.get() >= LEVELS {
            return Err(Fault::new("it calls itself, or nests, too deep"));
        }
        self.level.set(self.level.get() + 1);
        Ok(())
    }

    pub fn ascend(&self) {
        self.level.set(self.level.get().saturating_sub(1));
    }

    /// Goes one level deeper, until the answer is dropped.
    pub fn enter(&self) -> Outcome<Level<'_>> {
        self.descend()?;
        Ok(Level(self))
    }
}

pub struct Level<'a>(&'a Limits);

impl Drop for Level<'_> {
    fn drop(&mut self) {
        self.0.ascend();
    }
}

/// Runs on a stack of a known size, whatever thread asks.
pub fn on_stack<T: Send>(work: impl FnOnce() -> Outcome<T> + Send) -> Outcome<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("bombus-template".into()).stack_size(STACK);
        let thread = thread.spawn_scoped(scope, work);
        let thread = thread.map_err(|error| Fault::new(format!("no thread for it: {error}")))?;
        thread.join().unwrap_or_else(|_panic| Err(Fault::new("its thread panicked")))
    })
}
