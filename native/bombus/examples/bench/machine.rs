//! What the machine can do at this moment.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// What time is measured by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Clock {
    Wall,
    /// The time of all threads of this process: what others do counts for less.
    Processor,
}

impl Clock {
    /// Since some moment that is always the same.
    pub fn now(self) -> Duration {
        static START: OnceLock<Instant> = OnceLock::new();
        match self {
            Clock::Wall => START.get_or_init(Instant::now).elapsed(),
            Clock::Processor => processor_time(),
        }
    }
}

#[allow(unsafe_code)]
fn processor_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the time goes to a local, which lives longer than the call.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Bytes a second that all threads read together, from memory that no cache holds.
pub fn bandwidth(threads: usize) -> f64 {
    const SIZE: usize = 1 << 30;
    let words = vec![1u64; SIZE / 8];
    let mut best = 0.0f64;
    for _ in 0..3 {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for part in words.chunks(words.len().div_ceil(threads)) {
                scope.spawn(|| std::hint::black_box(sum(part)));
            }
        });
        best = best.max(SIZE as f64 / start.elapsed().as_secs_f64());
    }
    best
}

fn sum(words: &[u64]) -> u64 {
    let mut sums = [0u64; 32];
    for chunk in words.chunks_exact(32) {
        for (sum, word) in sums.iter_mut().zip(chunk) {
            *sum = sum.wrapping_add(*word);
        }
    }
    sums.iter().fold(0, |all, sum| all.wrapping_add(*sum))
}

/// Bytes of this process in memory (mapped files and all), where the system says so.
pub fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

/// The processor's own name.
pub fn name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find(|line| line.starts_with("model name"));
    let name = name.and_then(|line| line.split(": ").nth(1)).map(str::to_owned);
    name.unwrap_or_else(|| std::env::consts::ARCH.into())
}
