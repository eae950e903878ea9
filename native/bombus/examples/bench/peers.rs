//! llama.cpp and mlx-lm, in turn with us on the same machine.

use crate::Options;
use crate::measure::{Figures, Sizes};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Stdio};

/// llama-bench and llama-batched-bench without and with flash attention.
pub fn llama_cpp(options: &Options) -> Result<Vec<(String, Figures)>> {
    let Some(folder) = &options.llama_cpp else { return Ok(vec![]) };
    let gguf = options.gguf.as_deref().context("--llama-cpp needs --gguf")?;
    let mut peers = vec![];
    for (flag, name) in [("0", "llama.cpp"), ("1", "llama.cpp -fa 1")] {
        let peer = Peer { folder, gguf, flag, threads: options.cpu.threads };
        let mut figures = peer.single(&options.sizes)?;
        figures.extend(peer.batched(&options.sizes)?);
        peers.push((name.into(), figures));
    }
    Ok(peers)
}

struct Peer<'a> {
    folder: &'a Path,
    gguf: &'a Path,
    flag: &'a str,
    threads: usize,
}

impl Peer<'_> {
    fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(self.folder.join(program));
        command.arg("-m").arg(self.gguf).args(["-t", &self.threads.to_string()]);
        command.args(["-fa", self.flag]).args(arguments);
        let output = command.output().with_context(|| format!("running {program}"))?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{program} failed: {errors}");
        Ok(String::from_utf8(output.stdout)?)
    }

    fn single(&self, sizes: &Sizes) -> Result<Figures> {
        let mut figures = vec![];
        let prompts = join(&sizes.prompt);
        let output =
            self.run("llama-bench", &["-p", &prompts, "-n", "0", "-r", "1", "-o", "json"])?;
        for run in rows(&output)? {
            figures
                .push((format!("prefill {}", number(&run, "n_prompt")?), number(&run, "avg_ts")?));
        }
        let (depths, tokens) = (join(&sizes.depth), sizes.tokens.to_string());
        let arguments = ["-p", "0", "-n", &tokens, "-d", &depths, "-r", "1", "-o", "json"];
        for run in rows(&self.run("llama-bench", &arguments)?)? {
            figures
                .push((format!("decode at {}", number(&run, "n_depth")?), number(&run, "avg_ts")?));
        }
        Ok(figures)
    }

    fn batched(&self, sizes: &Sizes) -> Result<Figures> {
        let (batches, tokens) = (join(&sizes.batch), sizes.tokens.to_string());
        let most = sizes.batch.iter().max().context("--batch is empty")?;
        let context = (most * (sizes.tokens + 16)).next_multiple_of(256).to_string();
        let arguments = [
            "-c",
            &context,
            "-npp",
            "8",
            "-ntg",
            &tokens,
            "-npl",
            &batches,
            "--output-format",
            "jsonl",
        ];
        let output = self.run("llama-batched-bench", &arguments)?;
        let lines = output.lines().filter(|line| line.starts_with('{'));
        lines
            .map(|line| {
                let run: Value = serde_json::from_str(line)?;
                Ok((format!("{} sequences", number(&run, "pl")?), number(&run, "speed_tg")?))
            })
            .collect()
    }
}

fn join(numbers: &[usize]) -> String {
    numbers.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
}

fn rows(output: &str) -> Result<Vec<Value>> {
    Ok(serde_json::from_str(output)?)
}

fn number(run: &Value, field: &str) -> Result<f64> {
    run[field].as_f64().with_context(|| format!("`{field}` in {run}"))
}

/// mlx-lm on the checkpoint that we read, all figures, each the median of so many rounds.
pub fn mlx_lm(python: &Path, folder: &Path, sizes: &Sizes, rounds: usize) -> Result<Figures> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../bench/mlx_lm_bench.py");
    let lists = [&sizes.prompt, &sizes.depth, &sizes.batch].map(|sizes| join(sizes));
    let mut command = Command::new(python);
    command.arg(script).arg(folder).args(lists);
    command.args([sizes.tokens, rounds].map(|number| number.to_string()));
    // What it says there comes as it is measured.
    let output = command.stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "mlx-lm failed");
    let line = String::from_utf8(output.stdout)?;
    let figures: Value = serde_json::from_str(line.trim().lines().last().unwrap_or_default())?;
    let figures = figures.as_object().context("no figures of mlx-lm's")?;
    figures
        .iter()
        .map(|(what, _)| Ok((what.clone(), number(&Value::Object(figures.clone()), what)?)))
        .collect()
}
