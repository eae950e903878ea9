//! Messages to the caller, and errors on their way to it.

use bombus::error::{Error, Result, catch};
use bombus::tokenizer::workers;
use rustler::env::SavedTerm;
use rustler::{Encoder, Env, LocalPid, OwnedEnv, Term};

mod atoms {
    rustler::atoms! { ok, error }
}

/// An engine's error as Elixir sees it: `{reason, message}`.
pub fn error_term<'a>(env: Env<'a>, error: &Error) -> Term<'a> {
    // The reasons are a fixed set of names.
    let reason = rustler::Atom::from_str(env, error.reason()).map(|atom| atom.encode(env));
    (reason.unwrap_or_else(|_| error.reason().encode(env)), error.message()).encode(env)
}

pub fn result_term<'a, T: Encoder>(env: Env<'a>, result: &Result<T>) -> Term<'a> {
    match result {
        Ok(value) => (atoms::ok(), value).encode(env),
        Err(error) => (atoms::error(), error_term(env, error)).encode(env),
    }
}

/// A NIF that is `:ok` at once, and then answers `{reference, result}` from a thread of its own.
pub fn answer_later<'a, T: Encoder>(
    env: Env<'a>,
    reference: Term<'a>,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Term<'a> {
    let started = Address::caller(env, reference).answer_later(work);
    result_term(env, &started.map(|()| atoms::ok()))
}

/// Whom to send to, and the reference that goes in front.
pub struct Address {
    pid: LocalPid,
    env: OwnedEnv,
    reference: SavedTerm,
}

impl Address {
    /// The calling process.
    pub fn caller(env: Env, reference: Term) -> Self {
        Self::new(env.pid(), reference)
    }

    pub fn new(pid: LocalPid, reference: Term) -> Self {
        let env = OwnedEnv::new();
        let reference = env.save(reference);
        Self { pid, env, reference }
    }

    /// Sends `{reference, answer}` from a thread that is not the BEAM's; false where the process
    /// is dead.
    pub fn send(&self, answer: impl for<'a> FnOnce(Env<'a>) -> Term<'a>) -> bool {
        let sent = OwnedEnv::new().send_and_clear(&self.pid, |env| {
            let reference = self.env.run(|own| self.reference.load(own).in_env(env));
            (reference, answer(env))
        });
        sent.is_ok()
    }

    /// Sends `{reference, {:ok, :ok}}`, from whichever thread: a message cannot be sent so from one of
    /// the BEAM's.
    pub fn tell_ok(self) {
        let told = self.answer_later(|| Ok(rustler::types::atom::ok()));
        // Without a thread there is nobody to tell.
        _ = told;
    }

    /// Does `work` on a thread of its own and sends its result.
    pub fn answer_later<T: Encoder>(
        self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<()> {
        let thread = move || {
            let result = catch(work);
            self.send(|env| result_term(env, &result));
        };
        let spawned = std::thread::Builder::new().name("bombus-load".into()).spawn(thread);
        spawned.map(drop).map_err(|error| Error::OutOfMemory(format!("no thread: {error}")))
    }

    /// Does `work` on a thread for texts of `bytes` and sends its result. What one owner asks for
    /// is done in its order.
    pub fn answer_for_text<T: Encoder>(
        self,
        owner: usize,
        bytes: usize,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<()> {
        workers::run(owner, bytes, move || {
            let result = catch(work);
            self.send(|env| result_term(env, &result));
        })
    }
}
