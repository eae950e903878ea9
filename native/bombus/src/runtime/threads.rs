//! The threads that engines live on. One whose engine has ended waits for the next: MLX binds its
//! streams to the thread that made them, and keeps a thread of its own for each to the end of the
//! process.

use super::exit::{self, BusyGuard};
use crate::error::{Error, Result, catch};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, Once, PoisonError};

type Job = Box<dyn FnOnce() + Send>;

static IDLE: Mutex<Vec<Sender<Job>>> = Mutex::new(vec![]);

/// Runs `job` on a thread that no other job uses. A job must not panic.
pub fn run(job: impl FnOnce() + Send + 'static) -> Result<()> {
    let idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner).pop();
    let thread = idle.map_or_else(spawn, Ok)?;
    thread.send(Box::new(job)).map_err(|_| Error::Stopped)
}

fn spawn() -> Result<Sender<Job>> {
    let (sender, jobs) = channel::<Job>();
    let own = sender.clone();
    let serve = move || {
        for job in jobs {
            job();
            IDLE.lock().unwrap_or_else(PoisonError::into_inner).push(own.clone());
        }
    };
    let spawned = std::thread::Builder::new().name("bombus-engine".into()).spawn(serve);
    spawned.map_err(|error| Error::OutOfMemory(format!("no thread for the engine: {error}")))?;
    Ok(sender)
}

/// Runs `work` on such a thread, and waits for it.
pub fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    static EXIT: Once = Once::new();
    let (sender, done) = channel();
    run(move || {
        let busy = BusyGuard::enter();
        let result = catch(work);
        // Now the backend's globals are there.
        exit::register(&EXIT);
        drop(busy);
        _ = sender.send(result);
    })?;
    done.recv().map_err(|_| Error::Stopped)?
}
