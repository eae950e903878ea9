//! The parent: starts a child, sees it die or hang, and goes on behind the input that did it.

use super::Options;
use super::folder::temporary;
use super::parsers::{PARSERS, parser};
use super::random::Random;
use super::work::{COUNTS, Counts, Finding, State};
use anyhow::{Result, bail};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// An input that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(50);
const REPORT: Duration = Duration::from_secs(60);
/// More children than this do not die: something is wrong with all inputs.
const DEATHS: usize = 500;

struct Run<'a> {
    options: &'a Options,
    start: Instant,
    counts: Counts,
    findings: Vec<Finding>,
}

pub fn run(options: &Options) -> Result<()> {
    let folder = temporary()?;
    let mut run = Run { options, start: Instant::now(), counts: [0; COUNTS], findings: vec![] };
    let mut next = options.from;
    while let Some(after) = run.child(next, folder.path())? {
        next = after;
        if run.findings.len() > DEATHS {
            break;
        }
    }
    run.report();
    match run.findings.is_empty() {
        true => Ok(()),
        false => bail!("{} findings", run.findings.len()),
    }
}

impl Run<'_> {
    /// A child from this input on; -> where the next begins, if it died
    fn child(&mut self, from: u64, folder: &Path) -> Result<Option<u64>> {
        let state_path = folder.join("state");
        let (state, errors) = (State::open(&state_path)?, folder.join("stderr"));
        state.write(&[0; COUNTS])?;
        let mut child = self.spawn(from, &state_path, &errors)?;
        let died = self.wait(&mut child, &state)?;
        let counts = state.read();
        self.counts.iter_mut().zip(counts).skip(1).for_each(|(sum, count)| *sum += count);
        self.take_findings(&state_path)?;
        let Some(how) = died else { return Ok(None) };
        if counts == [0; COUNTS] {
            bail!("the child did not begin: {how}: {}", last_line(&errors));
        }
        let input = counts[0];
        let what = format!("{how}: {}", last_line(&errors));
        println!("input {input}: {what}");
        self.findings.push(Finding { input, parser: self.parser_of(input), what });
        let left = self.start.elapsed() < self.options.time();
        Ok(left.then_some(input + 1))
    }

    fn parser_of(&self, input: u64) -> &'static str {
        PARSERS[parser(&mut Random::of(self.options.seed, input))].0
    }

    fn spawn(&self, from: u64, state: &Path, errors: &Path) -> Result<Child> {
        let options = self.options;
        let minutes = options.time().saturating_sub(self.start.elapsed()).as_secs_f64() / 60.0;
        let inputs = options.inputs.saturating_sub(from - options.from);
        let mut command = Command::new(std::env::current_exe()?);
        let numbers = [
            ("--minutes", minutes.to_string()),
            ("--inputs", inputs.to_string()),
            ("--seed", options.seed.to_string()),
            ("--from", from.to_string()),
        ];
        numbers.iter().for_each(|(name, number)| _ = command.args([*name, number.as_str()]));
        if let Some(only) = &options.only {
            command.args(["--only", only]);
        }
        command.arg("--state").arg(state).stderr(std::fs::File::create(errors)?);
        Ok(command.spawn()?)
    }

    /// -> how it died, if it did
    fn wait(&self, child: &mut Child, state: &State) -> Result<Option<String>> {
        let (mut seen, mut since, mut reported) = ([0; COUNTS], Instant::now(), Instant::now());
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok((!status.success()).then(|| format!("died ({status})")));
            }
            let now = state.read();
            if now != seen {
                (seen, since) = (now, Instant::now());
            }
            if since.elapsed() > PATIENCE {
                child.kill()?;
                child.wait()?;
                return Ok(Some(format!("hung for {} s", PATIENCE.as_secs())));
            }
            if reported.elapsed() > REPORT {
                reported = Instant::now();
                let inputs = inputs(&self.counts) + inputs(&now);
                let seconds = self.start.elapsed().as_secs();
                println!("{inputs} inputs in {seconds} s, {} findings", self.findings.len());
            }
            std::thread::sleep(LOOK);
        }
    }

    /// What the child wrote down itself.
    fn take_findings(&mut self, state: &Path) -> Result<()> {
        let path = state.with_extension("findings");
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        std::fs::write(&path, "")?;
        for line in text.lines() {
            let Some((input, (parser, what))) =
                line.split_once('\t').and_then(|(n, rest)| Some((n, rest.split_once('\t')?)))
            else {
                continue;
            };
            let parser = PARSERS[parser.parse::<usize>()?].0;
            self.findings.push(Finding { input: input.parse()?, parser, what: what.into() });
        }
        Ok(())
    }

    fn report(&self) {
        let seconds = self.start.elapsed().as_secs_f64();
        let total = inputs(&self.counts);
        println!("{total} inputs in {seconds:.0} s, {:.0} a second", total as f64 / seconds);
        println!("parser                   inputs      taken  panics of tokenizers, caught");
        for (parser, (name, _)) in PARSERS.iter().enumerate() {
            let [inputs, taken, dependency] = [1, 2, 3].map(|of| self.counts[of + 3 * parser]);
            println!("{name:20} {inputs:>10} {taken:>10} {dependency:>29}");
        }
        let mut kinds: BTreeMap<(&str, String), Vec<u64>> = BTreeMap::new();
        for Finding { input, parser, what } in &self.findings {
            kinds.entry((*parser, kind_of(what))).or_default().push(*input);
        }
        for ((parser, what), inputs) in kinds {
            let seed = self.options.seed;
            println!(
                "{parser}: {what}: {} times: --seed {seed} --replay {}",
                inputs.len(),
                inputs[0]
            );
        }
    }
}

fn inputs(counts: &Counts) -> u64 {
    (0..PARSERS.len()).map(|parser| counts[1 + 3 * parser]).sum()
}

/// A finding without its numbers, so that the same one is listed once.
fn kind_of(what: &str) -> String {
    let kind: String =
        what.chars().take(200).map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
    kind.replace("00", "0")
}

fn last_line(errors: &Path) -> String {
    let bytes = std::fs::read(errors).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(2000)..]).into_owned();
    text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("no message").to_owned()
}
