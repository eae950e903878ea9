//! Feeds mutated files to all that reads files from outside, and counts what goes wrong: a crash, a
//! hang, memory without a bound, a panic of the engine's own.
//!
//!     cargo run --release -p bombus --example fuzz -- --minutes 5
//!
//! Input n of a seed is always the same: `--replay n` makes it again, and keeps its folder. The
//! inputs run in a child process, which another takes the place of when it dies.

mod corpus;
mod folder;
mod json;
mod memory;
mod parsers;
mod random;
mod text;
mod watch;
mod work;

use anyhow::{Result, bail};
use lexopt::{Parser, ValueExt};
use std::path::PathBuf;
use std::time::Duration;

const USAGE: &str = "\
usage: fuzz [options]
  --minutes M   how long (5)
  --inputs N    at most so many inputs
  --seed N      what the inputs are made of (20)
  --from N      the first input (0)
  --only NAME   one parser alone
  --replay N    one input alone; its files are kept, and shown";

#[derive(Clone)]
pub struct Options {
    pub minutes: f64,
    pub inputs: u64,
    pub seed: u64,
    pub from: u64,
    pub only: Option<String>,
    pub replay: bool,
    /// Of the child: where it says what it does.
    pub state: Option<PathBuf>,
}

impl Options {
    fn read() -> Result<Self> {
        let mut options = Self {
            minutes: 5.0,
            inputs: u64::MAX,
            seed: 20,
            from: 0,
            only: None,
            replay: false,
            state: None,
        };
        let mut parser = Parser::from_env();
        while let Some(argument) = parser.next()? {
            match argument {
                lexopt::Arg::Long("minutes") => options.minutes = parser.value()?.parse()?,
                lexopt::Arg::Long("inputs") => options.inputs = parser.value()?.parse()?,
                lexopt::Arg::Long("seed") => options.seed = parser.value()?.parse()?,
                lexopt::Arg::Long("from") => options.from = parser.value()?.parse()?,
                lexopt::Arg::Long("only") => options.only = Some(parser.value()?.string()?),
                lexopt::Arg::Long("replay") => {
                    options.from = parser.value()?.parse()?;
                    options.replay = true;
                }
                lexopt::Arg::Long("state") => options.state = Some(parser.value()?.into()),
                _ => bail!("{USAGE}"),
            }
        }
        Ok(options)
    }

    pub fn time(&self) -> Duration {
        Duration::from_secs_f64(self.minutes.max(0.0) * 60.0)
    }
}

fn main() -> Result<()> {
    let options = Options::read()?;
    if options.replay {
        return work::replay(&options);
    }
    match &options.state {
        Some(state) => work::run(&options, state),
        None => watch::run(&options),
    }
}
