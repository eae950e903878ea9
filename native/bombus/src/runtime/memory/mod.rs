//! How much memory is left: of the machine, of this process's control groups, of its addresses.

mod cgroups;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What is kept free for all else.
const MARGIN: u64 = 128 << 20;

/// How long a reading counts: files of the kernel are read, which costs more than a page is worth.
const FRESH: Duration = Duration::from_millis(50);

/// What was left, and what has been taken since.
struct Reading {
    at: Instant,
    /// none where the system does not say
    left: Option<u64>,
    taken: u64,
    /// Of a test: it is not read anew.
    pretended: bool,
}

static READING: Mutex<Option<Reading>> = Mutex::new(None);

/// Whether so many bytes can be had without the system ending this process, and where they can,
/// counts them as taken. Where the system does not say (only Linux does), they can.
pub fn take(bytes: usize) -> bool {
    let mut reading = reading();
    let current = reading.get_or_insert_with(Reading::now);
    if !current.is_fresh() {
        *current = Reading::now();
    }
    // Much may have been given back since.
    current.take(bytes) || {
        current.renew();
        current.take(bytes)
    }
}

/// So many bytes that were taken are free again.
pub fn give_back(bytes: usize) {
    if let Some(reading) = &mut *reading() {
        reading.taken = reading.taken.saturating_sub(bytes as u64);
    }
}

/// For tests: so many bytes are left from now on, until this is called with none.
#[doc(hidden)]
pub fn pretend(left: Option<u64>) {
    let pretended = |left| Reading { left: Some(left), pretended: true, ..Reading::now() };
    *reading() = left.map(pretended);
}

fn reading() -> MutexGuard<'static, Option<Reading>> {
    READING.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Reading {
    fn now() -> Self {
        Self { at: Instant::now(), left: left(), taken: 0, pretended: false }
    }

    fn is_fresh(&self) -> bool {
        self.pretended || self.at.elapsed() < FRESH
    }

    fn renew(&mut self) {
        if !self.pretended {
            *self = Self::now();
        }
    }

    fn take(&mut self, bytes: usize) -> bool {
        let wanted = self.taken.saturating_add(bytes as u64);
        let with_margin = wanted.checked_add(MARGIN);
        let fits = self.left.is_none_or(|left| with_margin.is_some_and(|all| all <= left));
        if fits {
            self.taken = wanted;
        }
        fits
    }
}

fn left() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok();
    let machine = meminfo.and_then(|text| available(&text));
    [machine, cgroups::left(), addresses()].into_iter().flatten().min()
}

/// `MemAvailable`, in bytes
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kilobytes.checked_mul(1024)
}

/// Where addresses are limited, an allocation that finds none ends the process.
#[cfg(target_os = "linux")]
fn addresses() -> Option<u64> {
    use rustix::process::{Resource, getrlimit};
    let limit = getrlimit(Resource::As).current?;
    let sizes = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = sizes.split(' ').next()?.parse().ok()?;
    Some(limit.saturating_sub(pages.saturating_mul(rustix::param::page_size() as u64)))
}

#[cfg(not(target_os = "linux"))]
fn addresses() -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_reads_what_linux_says() {
        let meminfo = "MemTotal:       24689764 kB\nMemAvailable:   20480000 kB\n";
        assert_eq!(available(meminfo), Some(20_480_000 * 1024));
        assert_eq!(available("MemTotal: 1 kB\n"), None);
        #[cfg(target_os = "linux")]
        assert!(left().is_some_and(|left| left > 0));
    }

    #[test]
    fn there_is_room_for_little_and_not_for_everything() {
        let read = |left| Reading { left, ..Reading::now() };
        assert!(!read(Some(u64::MAX)).take(usize::MAX));
        assert!(read(None).take(usize::MAX));
        let mut reading = read(Some(MARGIN + 100));
        assert!(reading.take(60) && !reading.take(41) && reading.take(40) && !reading.take(1));
        reading.taken -= 10;
        assert!(reading.take(10) && !reading.take(1));
    }
}
