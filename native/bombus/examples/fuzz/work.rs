//! The child: runs one input after another, and says in a file which it is at.

use super::folder::{Folder, temporary};
use super::parsers::{PARSERS, Parsers, parser};
use super::random::Random;
use super::{Options, memory};
use anyhow::{Context, Result};
use bombus::error::{Error, Result as Outcome};
use std::backtrace::Backtrace;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Files of at most a megabyte have no business to need more.
const MOST_MEMORY: usize = 384 << 20;
/// Longer takes an input that is not killed yet, but a nuisance.
const SLOW: Duration = Duration::from_secs(5);
/// As a thread of the engine has it.
const STACK: usize = 2 << 20;

/// What the parent reads: the input's number, then by parser how many there were, how many were
/// taken, and how many panics of the tokenizers crate became errors.
pub const COUNTS: usize = 1 + 3 * PARSERS.len();
pub type Counts = [u64; COUNTS];

pub struct State(File);

impl State {
    pub fn open(path: &Path) -> Result<Self> {
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        Ok(Self(file))
    }

    pub fn write(&self, counts: &Counts) -> Result<()> {
        let bytes: Vec<u8> = counts.iter().flat_map(|count| count.to_le_bytes()).collect();
        Ok(self.0.write_all_at(&bytes, 0)?)
    }

    /// Zeros where nothing was written yet.
    pub fn read(&self) -> Counts {
        let mut bytes = [0; 8 * COUNTS];
        _ = self.0.read_exact_at(&mut bytes, 0);
        let (counts, _) = bytes.as_chunks::<8>();
        std::array::from_fn(|place| u64::from_le_bytes(counts[place]))
    }
}

/// Something that must not happen.
pub struct Finding {
    pub input: u64,
    pub parser: &'static str,
    pub what: String,
}

/// A panic since the last input.
struct Panic {
    what: String,
    /// Below the tokenizers crate: the engine makes an error of it.
    dependency: bool,
}

static PANICS: Mutex<Vec<Panic>> = Mutex::new(vec![]);

fn panics() -> Vec<Panic> {
    std::mem::take(&mut *PANICS.lock().unwrap_or_else(PoisonError::into_inner))
}

fn note_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let dependency = Backtrace::force_capture().to_string().contains("tokenizers::");
        let note = Panic { what: panic.to_string().replace('\n', " "), dependency };
        PANICS.lock().unwrap_or_else(PoisonError::into_inner).push(note);
    }));
}

/// On a thread with the stack that the engine's threads have.
fn on_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, work)?;
        thread.join().map_err(|_| anyhow::anyhow!("the fuzzer itself panicked"))?
    })
}

pub fn run(options: &Options, state: &Path) -> Result<()> {
    note_panics();
    let parsers = Parsers::new()?;
    let file = State::open(state)?;
    let findings = state.with_extension("findings");
    let findings = OpenOptions::new().append(true).create(true).open(findings)?;
    on_thread(|| {
        let within = state.parent().context("a folder for the files")?;
        let (mut folder, mut counts) = (Folder::new(within)?, [0; COUNTS]);
        let start = Instant::now();
        for input in options.from..options.from.saturating_add(options.inputs) {
            let mut random = Random::of(options.seed, input);
            let parser = parser(&mut random);
            if start.elapsed() > options.time() {
                break;
            }
            if options.only.as_ref().is_some_and(|only| only != PARSERS[parser].0) {
                continue;
            }
            counts[0] = input;
            counts[1 + 3 * parser] += 1;
            file.write(&counts)?;
            folder.clear();
            parsers.write(&mut random, parser, &mut folder)?;
            let outcome = observe(&parsers, parser, &folder);
            counts[2 + 3 * parser] += u64::from(outcome.taken);
            counts[3 + 3 * parser] += outcome.dependency;
            for what in outcome.findings {
                writeln!(&findings, "{input}\t{parser}\t{what}")?;
            }
        }
        counts[0] += 1;
        file.write(&counts)
    })
}

#[derive(Default)]
struct Observed {
    taken: bool,
    dependency: u64,
    findings: Vec<String>,
}

/// Runs an input, and looks at what it took and left behind.
fn observe(parsers: &Parsers, parser: usize, folder: &Folder) -> Observed {
    let start = Instant::now();
    let run = || catch_unwind(AssertUnwindSafe(|| parsers.run(parser, folder)));
    let (outcome, bytes) = memory::peak(run);
    let mut observed = Observed { taken: matches!(outcome, Ok(Ok(()))), ..Observed::default() };
    let panics = panics();
    match &outcome {
        Err(_) => observed.findings.push(format!("escaped panic: {}", listed(&panics))),
        Ok(Err(Error::Panic(message))) if panics.is_empty() => {
            observed.findings.push(format!("panic: {message}"));
        }
        _ => {}
    }
    for panic in &panics {
        match panic.dependency {
            true => observed.dependency += 1,
            false => observed.findings.push(format!("panic: {}", panic.what)),
        }
    }
    if bytes > MOST_MEMORY {
        observed.findings.push(format!("memory: {} MiB", bytes >> 20));
    }
    if start.elapsed() > SLOW {
        observed.findings.push(format!("slow: {:.1} s", start.elapsed().as_secs_f64()));
    }
    observed
}

fn listed(panics: &[Panic]) -> String {
    panics.iter().map(|panic| panic.what.as_str()).collect::<Vec<_>>().join("; ")
}

/// One input, for a person.
pub fn replay(options: &Options) -> Result<()> {
    note_panics();
    let parsers = Parsers::new()?;
    on_thread(|| {
        let mut random = Random::of(options.seed, options.from);
        let temporary = temporary()?;
        let (parser, mut folder) = (parser(&mut random), Folder::new(temporary.path())?);
        parsers.write(&mut random, parser, &mut folder)?;
        let kept = folder.keep(&options.from.to_string()).context("the input's files")?;
        println!("input {} for {}: {}", options.from, PARSERS[parser].0, kept.display());
        let start = Instant::now();
        let run = || catch_unwind(AssertUnwindSafe(|| parsers.run(parser, &folder)));
        let (outcome, bytes) = memory::peak(run);
        let outcome: Outcome<()> = outcome.unwrap_or(Err(Error::Panic("that escaped".into())));
        println!("{outcome:.600?}");
        println!("{:.2} s, {} MiB", start.elapsed().as_secs_f64(), bytes >> 20);
        panics().iter().for_each(|panic| println!("panic: {}", panic.what));
        Ok(())
    })
}
