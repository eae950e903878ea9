//! All figures of a run, as a table and as JSON.

use crate::Options;
use crate::machine;
use crate::measure::{Figures, Load};
use serde_json::{Value, json};

pub struct Report {
    about: Value,
    checkpoint: u64,
    /// (who, what, one figure a round), in the order in which they first came
    figures: Vec<(String, String, Vec<f64>)>,
    bandwidth: Vec<f64>,
    loads: Vec<Load>,
}

impl Report {
    pub fn new(options: &Options, checkpoint: u64) -> Self {
        let about = json!({
            "machine": machine::name(),
            "model": options.model, "family": options.family.name, "bits": options.bits, "dtype": options.dtype,
            "device": options.device, "threads": options.cpu.threads,
            "simd": format!("{:?}", options.cpu.level), "tokens": options.sizes.tokens,
            "clock": format!("{:?}", options.clock),
        });
        Self { about, checkpoint, figures: vec![], bandwidth: vec![], loads: vec![] }
    }

    pub fn add(&mut self, who: &str, figures: Figures) {
        for (what, figure) in figures {
            let known = self.figures.iter_mut().find(|(w, name, _)| w == who && *name == what);
            match known {
                Some((_, _, rounds)) => rounds.push(figure),
                None => self.figures.push((who.into(), what, vec![figure])),
            }
        }
    }

    pub fn bandwidth(&mut self, bytes_per_second: f64) {
        self.bandwidth.push(bytes_per_second);
    }

    pub fn load(&mut self, load: Load) {
        self.loads.push(load);
    }

    pub fn json(&self) -> Value {
        let figures = self.figures.iter().map(|(who, what, rounds)| {
            json!({ "who": who, "what": what, "median": median(rounds), "rounds": rounds })
        });
        let loads = self.loads.iter().map(
            |load| json!({ "seconds": load.seconds, "resident": load.resident, "kv": load.kv }),
        );
        json!({
            "about": self.about, "checkpoint_bytes": self.checkpoint,
            "read_bandwidth": self.bandwidth, "loads": loads.collect::<Vec<_>>(),
            "tokens_per_second": figures.collect::<Vec<_>>(),
        })
    }

    pub fn print(&self) {
        println!("{}", self.about);
        let bandwidth = median(&self.bandwidth);
        let passes = bandwidth / self.checkpoint as f64;
        println!(
            "plain reads: {:.1} GB/s, so the checkpoint's {:.0} MB {passes:.0} times a second",
            bandwidth / 1e9,
            self.checkpoint as f64 / 1e6
        );
        for load in &self.loads {
            let megabytes = |bytes: u64| bytes as f64 / 1e6;
            let resident =
                load.resident.map_or("unknown".into(), |b| format!("{:.0}", megabytes(b)));
            let (seconds, kv) = (load.seconds, megabytes(load.kv));
            println!("loaded in {seconds:.3} s; {resident} MB in memory, {kv:.0} of them KV cache");
        }
        let mut who: Vec<&str> = vec![];
        let mut what: Vec<&str> = vec![];
        for (one, name, _) in &self.figures {
            push_new(&mut who, one);
            push_new(&mut what, name);
        }
        print!("{:18}", "tokens/s");
        who.iter().for_each(|who| print!("{who:>18}"));
        println!();
        for what in what {
            print!("{what:18}");
            for who in &who {
                let found = self.figures.iter().find(|(w, name, _)| w == who && name == what);
                match found {
                    Some((_, _, rounds)) => print!("{:18.1}", median(rounds)),
                    None => print!("{:>18}", "-"),
                }
            }
            println!();
        }
    }

    /// The time of the second for that of the first, round by round: the median, and all of them.
    pub fn print_ratios(&self) {
        let Some((first, ..)) = self.figures.first() else { return };
        println!();
        for (who, what, rounds) in self.figures.iter().filter(|(who, ..)| who != first) {
            let beside = self.figures.iter().find(|(w, name, _)| w == first && name == what);
            let Some((_, _, beside)) = beside else { continue };
            let ratios: Vec<f64> = beside.iter().zip(rounds).map(|(a, b)| a / b).collect();
            let all: Vec<String> = ratios.iter().map(|ratio| format!("{ratio:.2}")).collect();
            let median = median(&ratios);
            println!("{what:18} {who} / {first}: time {median:.3} ({})", all.join(" "));
        }
    }
}

fn push_new<'a>(list: &mut Vec<&'a str>, item: &'a str) {
    if !list.contains(&item) {
        list.push(item);
    }
}

pub fn median(rounds: &[f64]) -> f64 {
    let mut sorted = rounds.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}
