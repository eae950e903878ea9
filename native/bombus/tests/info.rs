//! What a model is without its weights, held against what loading finds.

#![allow(clippy::unwrap_used)]

mod common;

use bombus::backend::Device;
use bombus::backend::cpu::Options;
use bombus::engine::Engine;
use bombus::engine::scheduler::Limits;
use bombus::files::safetensors::TensorFiles;
use bombus::model::info::{Info, Role, Steps, info};
use bombus::spec::Quantization;
use common::*;
use serde_json::{Value, json};
use std::path::Path;
use tempfile::TempDir;

const INT4: Quantization = Quantization { bits: 4, group_size: 64 };

fn cpu() -> Device {
    Device::Cpu(Options::default())
}

fn of(case: &str) -> Info {
    info(&parity(case), cpu()).unwrap()
}

/// A copy of a fixture's model that may be broken.
fn copy(case: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(parity(case)).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    folder
}

fn change(folder: &Path, change: impl FnOnce(&mut Value)) {
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut config);
    std::fs::write(path, config.to_string()).unwrap();
}

#[test]
fn what_loads_has_no_problem_and_takes_the_bytes_of_its_tensors() {
    let fixtures = std::fs::read_dir(repository().join("test/fixtures/parity")).unwrap();
    let mut seen = 0;
    for folder in fixtures.map(|entry| entry.unwrap().path()) {
        let found = info(&folder, cpu()).unwrap();
        let name = folder.display();
        assert_eq!(found.problem, None, "{name}");
        assert!(found.missing_files.is_empty() && found.missing_tensors.is_empty());
        assert_eq!(found.steps, Steps::Own);
        let tensors = TensorFiles::open(&folder).unwrap();
        let taken = tensors.names().filter(|name| !found.config.leaves_out(name));
        let bytes: usize = taken.map(|name| tensors.get(name).unwrap().map().len()).sum();
        assert_eq!(found.weights, bytes as u64, "{name}");
        assert!(found.disk > found.weights, "{name}");
        seen += 1;
    }
    assert!(seen > 40, "{seen} fixtures");
}

#[test]
fn parameters_are_counted_by_role_and_layout() {
    let found = of("bf16-4bit");
    let spec = &found.config.spec;
    let (hidden, layers) = (spec.hidden as u64, spec.layers.len() as u64);
    let part = |role| found.parts.iter().find(|part| part.role == role).unwrap();
    let mlp = part(Role::Mlp);
    assert_eq!(mlp.parameters, layers * 3 * hidden * spec.layers[0].mlp.inner as u64);
    assert_eq!(mlp.layouts, [(Some(INT4), mlp.parameters)]);
    assert_eq!(part(Role::Embedding).parameters, hidden * spec.vocab as u64);
    assert!(found.parts.iter().all(|part| part.role != Role::Head));
    let norms: usize = spec.norms().map(|(_, width)| width).sum();
    let linears: u64 = found.parts.iter().map(|part| part.parameters).sum();
    assert_eq!(found.parameters, linears + norms as u64);
    assert!(of("bf16-overrides").parts.iter().any(|part| part.layouts.len() > 1));
    assert_eq!(of("bf16-dense").parts[0].layouts[0].0, None);
}

/// Two of four layers see 8 positions; keys and values are of 2 heads of 32 numbers.
#[test]
fn a_window_bounds_what_is_kept() {
    let found = of("bf16-gemma3");
    let layer = 2 * 2 * 32 * 2;
    assert_eq!(found.kv.position, 4 * layer);
    assert_eq!(found.kv.context, layer * (2 * 8 + 2 * 256));
}

#[test]
fn a_problem_is_the_error_of_a_load() {
    let truncated = |folder: &Path| {
        let file = folder.join("model.safetensors");
        let length = file.metadata().unwrap().len();
        std::fs::File::options().write(true).open(file).unwrap().set_len(length - 100).unwrap();
    };
    let gone = |folder: &Path| std::fs::remove_file(folder.join("model.safetensors")).unwrap();
    let layers = |folder: &Path| change(folder, |config| config["num_hidden_layers"] = json!(9));
    let wide = |folder: &Path| change(folder, |config| config["intermediate_size"] = json!(192));
    let fewer = |folder: &Path| change(folder, |config| config["num_hidden_layers"] = json!(1));
    let method = |folder: &Path| {
        change(folder, |config| {
            config["quantization"] = Value::Null;
            config["quantization_config"] = json!({ "quant_method": "fp8" });
        });
    };
    type Spoil<'a> = &'a dyn Fn(&Path);
    let cases: [(&str, Spoil); 6] = [
        ("truncated", &truncated),
        ("gone", &gone),
        ("layers", &layers),
        ("wide", &wide),
        ("fewer", &fewer),
        ("method", &method),
    ];
    for (name, spoil) in cases {
        let folder = copy("bf16-4bit");
        spoil(folder.path());
        let loaded = Engine::load(folder.path(), cpu(), Limits::default());
        let found = info(folder.path(), cpu()).unwrap();
        assert_eq!(found.problem, loaded.err(), "{name}");
        assert!(found.problem.is_some(), "{name}");
        assert_eq!(found.missing_tensors.is_empty(), name != "layers", "{name}");
    }
}

#[test]
fn a_configuration_that_is_refused_is_an_error() {
    let folder = copy("bf16-4bit");
    change(folder.path(), |config| config["model_type"] = json!("gpt2"));
    let loaded = Engine::load(folder.path(), cpu(), Limits::default());
    assert_eq!(info(folder.path(), cpu()).err(), loaded.err());
    assert!(info(&folder.path().join("nowhere"), cpu()).is_err());
}

#[test]
fn files_that_an_index_names_are_missed() {
    let folder = copy("f32-three-shards");
    let shard = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path());
    let shard = shard.filter(|path| path.extension().is_some_and(|end| end == "safetensors"));
    let shard = shard.max().unwrap();
    std::fs::remove_file(&shard).unwrap();
    let found = info(folder.path(), cpu()).unwrap();
    assert_eq!(found.missing_files, [shard.file_name().unwrap().to_str().unwrap()]);
    assert!(found.problem.is_some() && !found.missing_tensors.is_empty());
}

#[cfg(feature = "mlx")]
#[test]
fn it_says_whether_one_kernel_serves_a_model_on_a_card() {
    use bombus::backend::mlx;
    let gpu = Device::Mlx(mlx::Device::Gpu);
    let steps = |case: &str| info(&parity(case), gpu).unwrap().steps;
    assert!(matches!(steps("bf16-cohere2"), Steps::LayerByLayer(_)));
    assert!(matches!(steps("f32-tied"), Steps::LayerByLayer(_)));
    let mlx_cpu = info(&parity("f32-tied"), Device::Mlx(mlx::Device::Cpu)).unwrap();
    assert_eq!(mlx_cpu.steps, Steps::Mlx);
    let found = info(&parity("f32-tied"), gpu).unwrap();
    assert_eq!(
        found.problem.map(|error| error.reason()),
        (!mlx::gpu_available()).then_some("no_gpu")
    );
}
