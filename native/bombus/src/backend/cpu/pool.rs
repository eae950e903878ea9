//! The threads that a step's work is spread over: one pool for the process, so that several
//! models do not ask for more cores than there are.
//!
//! A step is some hundred short regions, a few microseconds to a millisecond each. Between them
//! the threads spin; soon after the last one they sleep, and cost nothing.

use super::lock;
use crate::backend::ticket_lock::{TicketGuard, TicketLock};
use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// How long a thread without work waits for more before it sleeps: longer than it takes to hand
/// out a token, shorter than anybody notices.
const PATIENCE: Duration = Duration::from_micros(300);
/// The chunks of a thread's range: enough for a thread that is slow for a while, and each large
/// enough to be read at the memory's speed.
const CHUNKS: usize = 8;
/// Fewer numbers than this are done before a second thread has begun.
const SERIAL: usize = 6 * 1024;
/// The clock is read once in so many spins.
const SPINS: u32 = 200;

/// The number of threads where nobody says otherwise: physical cores, as far as this process may
/// use them.
pub fn default_threads() -> usize {
    let allowed = std::thread::available_parallelism().map_or(1, usize::from);
    num_cpus::get_physical().clamp(1, allowed)
}

/// Some threads of the process's pool.
#[derive(Clone)]
pub struct Pool {
    threads: usize,
    global: &'static Global,
}

struct Global {
    /// Whoever holds it runs its steps; others wait in the order in which they came.
    steps: TicketLock,
    /// Locked while a region runs.
    workers: Mutex<Vec<Arc<Worker>>>,
}

struct Worker {
    /// Counts the regions that this worker was given, and those that it is done with.
    posted: AtomicUsize,
    done: AtomicUsize,
    asleep: AtomicBool,
    job: UnsafeCell<Option<Job>>,
    thread: OnceLock<Thread>,
}

#[derive(Clone, Copy)]
struct Job {
    work: *const (dyn Fn(usize) + Sync),
    thread: usize,
    panicked: *const AtomicBool,
}

// SAFETY: `job` is written before `posted` grows and read after; the writer waits for `done`.
unsafe impl Sync for Worker {}
// SAFETY: as above; what a job points to outlives the region.
unsafe impl Send for Worker {}

impl Pool {
    pub fn new(threads: usize) -> std::io::Result<Self> {
        static GLOBAL: OnceLock<Global> = OnceLock::new();
        let global =
            GLOBAL.get_or_init(|| Global { steps: TicketLock::new(), workers: Mutex::default() });
        let mut workers = lock(&global.workers);
        while workers.len() + 1 < threads {
            let index = workers.len() + 1;
            workers.push(Worker::spawn(index)?);
        }
        drop(workers);
        Ok(Self { threads, global })
    }

    /// Waits until no other model has the cores. Without a guard, single regions of two models alternate.
    pub fn guard(&self) -> TicketGuard {
        self.global.steps.take()
    }

    /// Calls `work` once for each thread number, at once, and returns when all are done.
    pub fn run(&self, work: &(dyn Fn(usize) + Sync)) {
        if self.threads == 1 {
            return work(0);
        }
        let panicked = AtomicBool::new(false);
        let workers = lock(&self.global.workers);
        let workers = &workers[..self.threads - 1];
        // SAFETY: the lifetime is forgotten, but nothing returns from here before every worker
        // is done with it: `Wait` waits even where `work` panics on this thread.
        let work: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(work) };
        let wait = Wait(workers);
        for (index, worker) in workers.iter().enumerate() {
            worker.post(Job { work, thread: index + 1, panicked: &panicked });
        }
        work(0);
        drop(wait);
        assert!(!panicked.load(Ordering::Relaxed), "a thread of the pool panicked");
    }

    /// Calls `work` for ranges that make up `0..items`, multiples of `grain` but for the last. Each
    /// thread has a range of its own, side by side in memory; one that is done helps the others.
    pub fn split(&self, items: usize, grain: usize, work: impl Fn(Range<usize>) + Sync) {
        let grains = items.div_ceil(grain);
        let chunk = grains.div_ceil(self.threads * CHUNKS);
        let chunks = grains.div_ceil(chunk.max(1));
        let first = |thread: usize| chunks * thread / self.threads;
        let next: Vec<AtomicUsize> =
            (0..self.threads).map(|thread| AtomicUsize::new(first(thread))).collect();
        self.run(&|thread| {
            for other in (thread..self.threads).chain(0..thread) {
                loop {
                    let place = next[other].fetch_add(1, Ordering::Relaxed);
                    if place >= first(other + 1) {
                        break;
                    }
                    let start = place * chunk * grain;
                    work(start..items.min(start + chunk * grain));
                }
            }
        });
    }

    /// Spreads rows of `width` numbers over the threads, where they are worth it.
    pub fn rows(&self, rows: usize, width: usize, work: impl Fn(Range<usize>) + Sync) {
        match rows > 1 && rows * width > SERIAL {
            true => self.split(rows, 1, work),
            false => work(0..rows),
        }
    }

    /// Calls `work` for each of `0..items`; a thread that is done with one takes the next.
    pub fn each(&self, items: usize, work: impl Fn(usize) + Sync) {
        let next = AtomicUsize::new(0);
        let take = |_thread| loop {
            let item = next.fetch_add(1, Ordering::Relaxed);
            if item >= items {
                return;
            }
            work(item);
        };
        match items {
            1 => take(0),
            _ => self.run(&take),
        }
    }
}

struct Wait<'a>(&'a [Arc<Worker>]);

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        for worker in self.0 {
            let posted = worker.posted.load(Ordering::Relaxed);
            let mut spins = 0u32;
            while worker.done.load(Ordering::Acquire) != posted {
                spins += 1;
                // More threads than cores: the one that is waited for needs this one.
                if spins.is_multiple_of(10_000) {
                    std::thread::yield_now();
                }
                std::hint::spin_loop();
            }
        }
    }
}

impl Worker {
    fn spawn(index: usize) -> std::io::Result<Arc<Self>> {
        let worker = Arc::new(Self {
            posted: AtomicUsize::new(0),
            done: AtomicUsize::new(0),
            asleep: AtomicBool::new(false),
            job: UnsafeCell::new(None),
            thread: OnceLock::new(),
        });
        let own = worker.clone();
        let handle = std::thread::Builder::new()
            .name(format!("bombus-cpu-{index}"))
            .spawn(move || own.serve())?;
        _ = worker.thread.set(handle.thread().clone());
        Ok(worker)
    }

    fn post(&self, job: Job) {
        // SAFETY: the last job is done, so the worker does not look here before `posted` grows.
        unsafe { *self.job.get() = Some(job) };
        self.posted.fetch_add(1, Ordering::SeqCst);
        if self.asleep.load(Ordering::SeqCst)
            && let Some(thread) = self.thread.get()
        {
            thread.unpark();
        }
    }

    fn serve(&self) {
        let mut seen = 0;
        loop {
            seen = self.wait(seen);
            // SAFETY: `posted` has grown, so the job is there, and stays until `done` has too.
            if let Some(job) = unsafe { *self.job.get() } {
                // SAFETY: as above.
                let (work, panicked) = unsafe { (&*job.work, &*job.panicked) };
                if let Err(payload) = catch_unwind(AssertUnwindSafe(|| work(job.thread))) {
                    // Whatever its destructor does must not end this thread.
                    std::mem::forget(payload);
                    panicked.store(true, Ordering::Relaxed);
                }
            }
            self.done.store(seen, Ordering::Release);
        }
    }

    /// Waits for a region after number `seen`; -> its number
    fn wait(&self, seen: usize) -> usize {
        loop {
            let started = Instant::now();
            while started.elapsed() < PATIENCE {
                for _ in 0..SPINS {
                    let posted = self.posted.load(Ordering::Acquire);
                    if posted != seen {
                        return posted;
                    }
                    std::hint::spin_loop();
                }
            }
            self.asleep.store(true, Ordering::SeqCst);
            while self.posted.load(Ordering::SeqCst) == seen {
                std::thread::park();
            }
            self.asleep.store(false, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_and_every_item_is_served() {
        let pool = Pool::new(3).unwrap();
        let _guard = pool.guard();
        for items in [0, 1, 2, 7, 100] {
            let counts: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
            pool.split(items, 4, |range| {
                range.for_each(|item| _ = counts[item].fetch_add(1, Ordering::Relaxed));
            });
            pool.each(items, |item| _ = counts[item].fetch_add(1, Ordering::Relaxed));
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 2));
        }
    }

    #[test]
    fn a_panic_comes_back_and_the_pool_serves_on() {
        let pool = Pool::new(2).unwrap();
        for bad in [0, 1] {
            let _guard = pool.guard();
            let caught = catch_unwind(AssertUnwindSafe(|| {
                pool.run(&|thread| assert!(thread != bad, "thread {bad}"));
            }));
            assert!(caught.is_err());
            let ran = AtomicUsize::new(0);
            pool.run(&|_| _ = ran.fetch_add(1, Ordering::Relaxed));
            assert_eq!(ran.into_inner(), 2);
        }
    }

    #[test]
    fn one_guard_is_held_at_a_time() {
        let holders = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let pool = Pool::new(2).unwrap();
                    for _ in 0..200 {
                        let _guard = pool.guard();
                        assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0);
                        pool.run(&|_| {});
                        holders.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
    }
}
