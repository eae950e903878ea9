//! Threads that render templates and make tokens of texts. Short texts have threads of their own,
//! so that they never wait for long ones.

use crate::error::{Error, Result, catch};
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, OnceLock, PoisonError};

/// Bytes that a short text may have: it takes milliseconds.
const SHORT: usize = 16 << 10;

/// A thread's stack: more than a template may take.
const STACK: usize = 16 << 20;

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Lane {
    jobs: Mutex<VecDeque<Job>>,
    waiting: Condvar,
}

struct Workers {
    short: Vec<&'static Lane>,
    long: Vec<&'static Lane>,
}

/// Runs a job on a thread for texts of `bytes`, and returns at once. The jobs of one `owner` and
/// length run in their order.
pub fn run(owner: usize, bytes: usize, job: impl FnOnce() + Send + 'static) -> Result<()> {
    static WORKERS: OnceLock<Result<Workers>> = OnceLock::new();
    let workers = WORKERS.get_or_init(|| Ok(Workers { short: lanes(4)?, long: lanes(2)? }));
    let workers = workers.as_ref().map_err(Error::clone)?;
    let lanes = if bytes <= SHORT { &workers.short } else { &workers.long };
    let lane = lanes[owner % lanes.len()];
    lane.jobs.lock().unwrap_or_else(PoisonError::into_inner).push_back(Box::new(job));
    lane.waiting.notify_one();
    Ok(())
}

fn lanes(count: usize) -> Result<Vec<&'static Lane>> {
    (0..count).map(|_| lane()).collect()
}

/// Its thread waits for jobs to the end of the process.
fn lane() -> Result<&'static Lane> {
    let lane: &'static Lane = Box::leak(Box::default());
    let thread = std::thread::Builder::new().name("bombus-text".into()).stack_size(STACK);
    let spawned = thread.spawn(move || {
        loop {
            let job = lane.next();
            _ = catch(|| {
                job();
                Ok(())
            });
        }
    });
    spawned.map_err(|error| Error::OutOfMemory(format!("no thread for texts: {error}")))?;
    Ok(lane)
}

impl Lane {
    fn next(&self) -> Job {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match jobs.pop_front() {
                Some(job) => return job,
                None => jobs = self.waiting.wait(jobs).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn short_texts_do_not_wait_for_long_ones() {
        let (hold, held) = mpsc::channel::<()>();
        let held = std::sync::Arc::new(Mutex::new(held));
        for owner in 0..16 {
            let held = held.clone();
            run(owner, SHORT + 1, move || _ = held.lock().map(|held| held.recv())).unwrap();
        }
        run(7, 1, || panic!("a job that fails takes no thread with it")).unwrap();
        let (sender, done) = mpsc::channel();
        for place in 0..8 {
            let sender = sender.clone();
            run(7, 1, move || _ = sender.send(place)).unwrap();
        }
        let places: Vec<_> = (0..8).map(|_| done.recv().unwrap()).collect();
        assert_eq!(places, (0..8).collect::<Vec<_>>());
        drop(hold);
    }
}
