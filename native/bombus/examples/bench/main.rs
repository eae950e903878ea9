//! How fast the engine is, without a BEAM, beside llama.cpp and mlx-lm. See bench/README.md.
//!
//!     cargo run --release -p bombus --example bench -- --prompt 64,512 --batch 1,2,4,8

mod checkpoint;
mod family;
mod machine;
mod measure;
mod peers;
#[cfg(feature = "mlx")]
mod profile;
mod report;

use anyhow::{Context, Result, bail};
use bombus::backend::Device;
use bombus::backend::cpu::{self, Level};
#[cfg(feature = "mlx")]
use bombus::model::adapter::Adapter;
use family::{Family, QWEN3};
use lexopt::{Parser, ValueExt};
use machine::Clock;
use measure::Sizes;
use std::path::{Path, PathBuf};

const USAGE: &str = "\
usage: bench [options]
  --model NAME       0.6b (default), 8b or tiny: Qwen3's shapes, 4 bits, groups of 64, random weights
  --family NAME      another family in the same shape, and Qwen3 in turn with it: the ratios of the two
  --bits N           4 (default), 2, 3, 5, 6 or 8
  --dtype NAME       of scales and norms: bf16 (default), f16 or f32
  --device NAME      cpu (default), mlx-cpu or gpu (with the feature mlx)
  --threads N        physical cores by default
  --simd NAME        portable, avx2 or avx512; the best by default
  --prompt N,...     prefill of so many tokens, and embeddings of a text and of eight of so many (64,512);
                     an empty list is none
  --depth N,...      decode behind so many tokens (0,512)
  --batch N,...      so many sequences at once (1,2,4,8)
  --adapters N       of rank 8 on all layers: one stream with one, 16 sequences (on a GPU 32) with one,
                     and with N mixed (0)
  --clock NAME       wall (default) or processor: the time of all threads, where others use the machine too
  --tokens N         generated for each figure (64)
  --prefill-chunk N  prompt tokens in a step (64 on cpu, 512 with MLX)
  --repeat N         rounds; every figure is their median (3)
  --dir PATH         where checkpoints are kept (a folder of the system's for temporary files)
  --profile          with MLX, where the time goes, for --prompt, --depth and --batch, with --adapters 1
                     also with an adapter; nothing else
  --json PATH        writes all figures there
  --llama-cpp PATH   a folder with llama-bench and llama-batched-bench; takes turns with us
  --gguf PATH        what those read
  --mlx-lm PYTHON    a Python that has mlx_lm; takes its turn on the same checkpoint";

pub struct Options {
    pub model: String,
    pub family: &'static Family,
    pub bits: usize,
    pub dtype: String,
    pub device: String,
    pub cpu: cpu::Options,
    pub clock: Clock,
    pub sizes: Sizes,
    pub repeat: usize,
    pub dir: PathBuf,
    pub json: Option<PathBuf>,
    pub llama_cpp: Option<PathBuf>,
    pub gguf: Option<PathBuf>,
    pub mlx_lm: Option<PathBuf>,
    pub adapters: usize,
    pub prefill_chunk: Option<usize>,
    pub profile: bool,
}

impl Options {
    fn parse() -> Result<Self> {
        let mut options = Self {
            model: "0.6b".into(),
            family: Family::find(QWEN3)?,
            bits: 4,
            dtype: "bf16".into(),
            device: "cpu".into(),
            cpu: cpu::Options::default(),
            clock: Clock::Wall,
            sizes: Sizes {
                prompt: vec![64, 512],
                depth: vec![0, 512],
                batch: vec![1, 2, 4, 8],
                tokens: 64,
            },
            repeat: 3,
            dir: std::env::temp_dir().join("bombus-bench"),
            json: None,
            llama_cpp: None,
            gguf: None,
            mlx_lm: None,
            adapters: 0,
            prefill_chunk: None,
            profile: false,
        };
        let mut parser = Parser::from_env();
        while let Some(argument) = parser.next()? {
            let lexopt::Arg::Long(name) = argument else { bail!("{USAGE}") };
            let name = name.to_owned();
            if name == "help" {
                println!("{USAGE}");
                std::process::exit(0);
            }
            if name == "profile" {
                options.profile = true;
                continue;
            }
            let value = parser.value()?;
            let numbers = || -> Result<Vec<usize>> {
                let text = value.clone().string()?;
                if text.is_empty() {
                    return Ok(vec![]);
                }
                text.split(',').map(|n| n.trim().parse().context("a number")).collect()
            };
            match name.as_str() {
                "model" => options.model = value.string()?,
                "family" => options.family = Family::find(&value.string()?)?,
                "bits" => options.bits = value.parse()?,
                "dtype" => options.dtype = value.string()?,
                "device" => options.device = value.string()?,
                "threads" => options.cpu.threads = value.parse()?,
                "simd" => options.cpu.level = level(&value.string()?)?,
                "clock" => options.clock = clock(&value.string()?)?,
                "prompt" => options.sizes.prompt = numbers()?,
                "depth" => options.sizes.depth = numbers()?,
                "batch" => options.sizes.batch = numbers()?,
                "adapters" => options.adapters = value.parse()?,
                "prefill-chunk" => options.prefill_chunk = Some(value.parse()?),
                "tokens" => options.sizes.tokens = value.parse()?,
                "repeat" => options.repeat = value.parse()?,
                "dir" => options.dir = value.into(),
                "json" => options.json = Some(value.into()),
                "llama-cpp" => options.llama_cpp = Some(value.into()),
                "gguf" => options.gguf = Some(value.into()),
                "mlx-lm" => options.mlx_lm = Some(value.into()),
                _ => bail!("--{name} is unknown\n{USAGE}"),
            }
        }
        Ok(options)
    }

    fn device(&self) -> Result<Device> {
        Ok(match self.device.as_str() {
            "cpu" => Device::Cpu(self.cpu),
            #[cfg(feature = "mlx")]
            "mlx-cpu" => Device::Mlx(bombus::backend::mlx::Device::Cpu),
            #[cfg(feature = "mlx")]
            "gpu" => Device::Mlx(bombus::backend::mlx::Device::Gpu),
            other => bail!("there is no device {other} in this build"),
        })
    }
}

fn clock(name: &str) -> Result<Clock> {
    Ok(match name {
        "wall" => Clock::Wall,
        "processor" => Clock::Processor,
        other => bail!("--clock {other} is unknown"),
    })
}

fn level(name: &str) -> Result<Level> {
    Ok(match name {
        "portable" => Level::Portable,
        "avx2" => Level::Avx2,
        "avx512" => Level::Avx512,
        other => bail!("--simd {other} is unknown"),
    })
}

#[cfg(feature = "mlx")]
fn profile(options: &Options, folder: &Path, device: Device) -> Result<()> {
    let Device::Mlx(device) = device else { bail!("--profile is for --device gpu or mlx-cpu") };
    let adapters = checkpoint::adapters(folder, options.adapters.min(1))?;
    let adapter = adapters.first().map(|path| Adapter::open(path, None)).transpose()?;
    let tables = profile::profile(options, folder, adapter.as_ref(), device)?;
    write(options, &serde_json::to_value(&tables)?)
}

#[cfg(not(feature = "mlx"))]
fn profile(_: &Options, _: &Path, _: Device) -> Result<()> {
    bail!("--profile needs the feature mlx")
}

/// Qwen3 and the family in the same shape, in turn.
fn beside(options: &Options, device: Device) -> Result<()> {
    let family = options.family;
    let sides = [Family::find(QWEN3)?, family];
    let folders = sides.map(|side| checkpoint::make(options, side, family));
    let [qwen3, other] = folders;
    let folders = [qwen3?, other?];
    let mut report = report::Report::new(options, checkpoint::bytes(&folders[1])?);
    report.bandwidth(machine::bandwidth(options.cpu.threads));
    for (side, figures) in sides.iter().zip(measure::in_turn(&folders, device, options)?) {
        report.add(side.name, figures);
    }
    report.print();
    report.print_ratios();
    write(options, &report.json())
}

fn write(options: &Options, json: &serde_json::Value) -> Result<()> {
    if let Some(path) = &options.json {
        std::fs::write(path, serde_json::to_string_pretty(json)?)?;
    }
    Ok(())
}

fn main() -> Result<()> {
    let options = Options::parse()?;
    let device = options.device()?;
    if options.family.name != QWEN3 && !options.profile {
        return beside(&options, device);
    }
    let folder = checkpoint::make(&options, options.family, options.family)?;
    if options.profile {
        return profile(&options, &folder, device);
    }
    let adapters = checkpoint::adapters(&folder, options.adapters)?;
    let mut report = report::Report::new(&options, checkpoint::bytes(&folder)?);
    for round in 0..options.repeat {
        report.bandwidth(machine::bandwidth(options.cpu.threads));
        let (figures, load) = measure::run(&folder, &adapters, device, &options)?;
        report.add("bombus", figures);
        report.load(load);
        for (name, figures) in peers::llama_cpp(&options)? {
            report.add(&name, figures);
        }
        if round == 0
            && let Some(python) = &options.mlx_lm
        {
            report.add("mlx-lm", peers::mlx_lm(python, &folder, &options.sizes, options.repeat)?);
        }
    }
    report.print();
    write(&options, &report.json())
}
