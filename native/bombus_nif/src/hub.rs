//! Downloads from the Hub: their settings, what is told of them, and their end with their caller.

use crate::answer::{Address, answer_later, result_term};
use bombus::error::{Error, Result, catch_in};
use bombus::hub::{self, Event, Kind, Settings, Source, Token, Watch};
use rustler::{Encoder, Env, LocalPid, Monitor, NifMap, NifUnitEnum, Resource, ResourceArc, Term};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// A download under way.
pub struct DownloadHandle {
    watch: Arc<Watch>,
    listener: Listener,
}

/// Whom to tell; nobody any more, once the caller has gone on to other things.
type Listener = Arc<Mutex<Option<Address>>>;

#[rustler::resource_impl]
impl Resource for DownloadHandle {
    const IMPLEMENTS_DOWN: bool = true;

    /// The caller is dead.
    fn down<'a>(&'a self, _env: Env<'a>, _pid: LocalPid, _monitor: Monitor) {
        self.watch.stop();
    }
}

/// A secret that may stand in a call's arguments: these are shown where a call fails.
pub struct TokenHandle(Token);

#[rustler::resource_impl]
impl Resource for TokenHandle {}

#[rustler::nif]
fn hide_token(token: String) -> ResourceArc<TokenHandle> {
    ResourceArc::new(TokenHandle(Token(token)))
}

mod atoms {
    rustler::atoms! { progress, waiting, warning, done }
}

#[derive(NifMap)]
struct Wanted {
    endpoint: String,
    cache: String,
    token: Option<ResourceArc<TokenHandle>>,
    offline: bool,
    /// milliseconds
    pause: u64,
    /// milliseconds
    pace: u64,
    /// bytes
    most: u64,
    id: String,
    revision: String,
    subdir: Option<String>,
}

impl Wanted {
    fn split(self) -> (Settings, Source) {
        let Wanted { endpoint, cache, token, offline, pause, pace, most, id, revision, subdir } =
            self;
        let token = token.map(|token| token.0.clone());
        let (pause, pace) = (Duration::from_millis(pause), Duration::from_millis(pace));
        let settings =
            Settings { endpoint, cache: cache.into(), token, offline, pause, pace, most };
        (settings, Source { id, revision, subdir })
    }
}

#[derive(NifUnitEnum)]
enum KindOption {
    Model,
    Tokenizer,
    Adapter,
    Any,
}

/// What is fetched.
#[derive(NifUnitEnum)]
enum WantedOption {
    Model,
    Tokenizer,
    Adapter,
    Any,
    /// a new folder with a model's files without its weights
    Outline,
}

impl WantedOption {
    fn fetch(&self, settings: &Settings, source: &Source, watch: &Watch) -> Result<PathBuf> {
        let kind = match self {
            WantedOption::Outline => return hub::outline(settings, source, watch),
            WantedOption::Model => Kind::Model,
            WantedOption::Tokenizer => Kind::Tokenizer,
            WantedOption::Adapter => Kind::Adapter,
            WantedOption::Any => Kind::Any,
        };
        hub::fetch(settings, source, kind, watch)
    }
}

impl From<KindOption> for Kind {
    fn from(kind: KindOption) -> Self {
        match kind {
            KindOption::Model => Kind::Model,
            KindOption::Tokenizer => Kind::Tokenizer,
            KindOption::Adapter => Kind::Adapter,
            KindOption::Any => Kind::Any,
        }
    }
}

/// `{:ok, handle}` at once, then messages `{reference, event}`: `{:progress, bytes, total, received}`,
/// `{:waiting, reason, milliseconds}`, `{:warning, message}`, and at the end
/// `{:done, {:ok, folder} | {:error, {reason, message}}}`.
#[rustler::nif]
fn fetch<'a>(env: Env<'a>, wanted: Wanted, what: WantedOption, reference: Term<'a>) -> Term<'a> {
    let (settings, source) = wanted.split();
    let listener: Listener = Arc::new(Mutex::new(Some(Address::caller(env, reference))));
    let told = listener.clone();
    let watch = Arc::new(Watch::new(move |event| tell(&told, |env| event_term(env, &event))));
    let handle = DownloadHandle { watch: watch.clone(), listener: listener.clone() };
    let handle = ResourceArc::new(handle);
    env.monitor(&handle, &env.pid());
    let work = move || {
        let place = format!("fetching `{}`", source.id);
        let folder = catch_in(&place, || what.fetch(&settings, &source, &watch));
        let folder = folder.map(|folder| folder.display().to_string());
        tell(&listener, |env| (atoms::done(), result_term(env, &folder)).encode(env));
    };
    let spawned = std::thread::Builder::new().name("bombus-hub".into()).spawn(work);
    let started: Result<_> = spawned
        .map(|_thread| handle)
        .map_err(|error| Error::OutOfMemory(format!("no thread: {error}")));
    result_term(env, &started)
}

fn tell(listener: &Listener, event: impl for<'a> FnOnce(Env<'a>) -> Term<'a>) {
    if let Some(address) = &*listener.lock().unwrap_or_else(PoisonError::into_inner) {
        address.send(event);
    }
}

/// The download ends soon, and nothing more is told of it.
#[rustler::nif]
fn stop_fetch(handle: ResourceArc<DownloadHandle>) -> rustler::Atom {
    handle.watch.stop();
    handle.listener.lock().unwrap_or_else(PoisonError::into_inner).take();
    rustler::types::atom::ok()
}

/// Answers `{reference, {:ok, folder} | {:error, {reason, message}}}`.
#[rustler::nif]
fn cached<'a>(env: Env<'a>, wanted: Wanted, kind: KindOption, reference: Term<'a>) -> Term<'a> {
    let (settings, source) = wanted.split();
    answer_later(env, reference, move || {
        Ok(hub::cached(&settings, &source, kind.into())?.display().to_string())
    })
}

/// Answers `{reference, {:ok, bytes} | {:error, {reason, message}}}`.
#[rustler::nif]
fn remove_cached<'a>(env: Env<'a>, cache: String, id: String, reference: Term<'a>) -> Term<'a> {
    let work = move || hub::remove(Path::new(&cache), &id);
    answer_later(env, reference, work)
}

fn event_term<'a>(env: Env<'a>, event: &Event) -> Term<'a> {
    match event {
        Event::Progress { bytes, total, received } => {
            (atoms::progress(), bytes, total, received).encode(env)
        }
        Event::Waiting { reason, pause } => {
            (atoms::waiting(), reason, pause.as_millis() as u64).encode(env)
        }
        Event::Warning(message) => (atoms::warning(), message).encode(env),
    }
}
