//! The process that models live in: its threads, its end, its memory, its numbers, and work that
//! nobody waits for any more.

pub mod abandon;
pub mod exit;
pub mod memory;
pub mod metrics;
pub mod threads;
