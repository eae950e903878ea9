//! What the families have beside their arithmetic, which `parity.rs` is about: wrappers, names, caches
//! that let go of what a window does not see.

#![allow(clippy::unwrap_used)]

mod common;

use bombus::engine::Engine;
use bombus::engine::scheduler::Limits;
use bombus::files::safetensors::{NewTensor, TensorFile, write};
use bombus::model::adapter::Adapter;
use bombus::model::convert::save;
use bombus::model::weights;
use bombus::spec::Quantization;
use common::*;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;

fn config(case: &str) -> Value {
    serde_json::from_slice(&std::fs::read(parity(case).join("config.json")).unwrap()).unwrap()
}

fn write_config(folder: &Path, config: &Value) {
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
}

/// The case as a language model within another, as `model_type`.
fn wrap(case: &str, model_type: &str, folder: &Path, name: impl Fn(&str) -> String, more: &[&str]) {
    let mut inner = config(case);
    let fields = inner.as_object_mut().unwrap();
    let mut outer = json!({ "model_type": model_type, "vision_config": { "hidden_size": 7 } });
    for name in ["quantization", "eos_token_id"] {
        outer[name] = fields.remove(name).unwrap();
    }
    outer["vocab_size"] = fields["vocab_size"].clone();
    outer["text_config"] = inner;
    write_config(folder, &outer);
    renamed(case, folder, |own| Some(name(own)), more);
}

const IDS: [u32; 24] =
    [9, 200, 31, 7, 7, 80, 255, 3, 0, 19, 64, 128, 33, 12, 45, 90, 17, 2, 2, 5, 141, 77, 230, 8];

#[test]
fn a_language_model_in_a_wrapper_answers_as_alone() {
    let prefixed = |name: &str| format!("language_model.{name}");
    let published = |name: &str| match name.strip_prefix("model.") {
        Some(rest) => format!("model.language_model.{rest}"),
        None => name.to_owned(),
    };
    type Rename = fn(&str) -> String;
    let cases: [(&str, &str, Rename, &[&str]); 3] = [
        ("f32-gemma3", "gemma3", prefixed, &["vision_tower.a.weight", "multi_modal_projector.b"]),
        ("f32-ministral3", "mistral3", prefixed, &["vision_tower.a.weight"]),
        ("f32-mistral-windows", "llava", published, &["model.vision_tower.a.weight"]),
    ];
    for device in devices() {
        for (case, model_type, rename, more) in cases {
            let folder = tempfile::tempdir().unwrap();
            wrap(case, model_type, folder.path(), rename, more);
            let engine = Engine::load(folder.path(), device, Limits::default()).unwrap();
            assert_eq!(engine.config().model_type, model_type);
            let warnings = engine.config().warnings.join("\n");
            assert!(warnings.contains(&format!("left, {} tensors", more.len())), "{warnings}");
            assert!(warnings.contains("vision_tower"), "{warnings}");
            let alone = load_on(device, case);
            assert_eq!(engine.config().eos_token_ids, alone.config().eos_token_ids);
            assert_eq!(score(&engine, &IDS, None).unwrap(), score(&alone, &IDS, None).unwrap());
            // Its adapters name modules as its files do.
            let theirs = folder.path().join("adapter");
            std::fs::create_dir(&theirs).unwrap();
            let source = parity(case).join("adapters/last-all");
            let settings = source.join("adapter_config.json");
            std::fs::copy(settings, theirs.join("adapter_config.json")).unwrap();
            adapter_with(&source, &theirs, rename);
            let theirs = Arc::new(Adapter::open(&theirs, None).unwrap());
            let own = adapter(case, "last-all");
            let [theirs, own] = [(&engine, theirs), (&alone, own)]
                .map(|(engine, adapter)| score(engine, &IDS, Some(adapter)).unwrap());
            assert_eq!(theirs, own, "{case}");
            assert_ne!(own, score(&alone, &IDS, None).unwrap(), "{case}");
        }
    }
}

fn adapter_with(from: &Path, to: &Path, name: impl Fn(&str) -> String) {
    let file = TensorFile::open(&from.join("adapters.safetensors")).unwrap();
    let names = file.names();
    let read = |own: &String| {
        let view = file.tensor(own).unwrap();
        (name(own), view.dtype.to_string(), view.shape.to_vec(), view.read().unwrap())
    };
    let tensors: Vec<_> = names.iter().map(read).collect();
    let tensors = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| NewTensor::new(name, dtype, shape, bytes).unwrap());
    write(&to.join("adapters.safetensors"), tensors.collect(), None).unwrap();
}

/// As Qwen3-Embedding is published.
#[test]
fn a_model_without_its_first_name_answers_as_with_it() {
    let folder = tempfile::tempdir().unwrap();
    write_config(folder.path(), &config("f32-tied"));
    let bare = |name: &str| Some(name.strip_prefix("model.").unwrap_or(name).to_owned());
    renamed("f32-tied", folder.path(), bare, &[]);
    for device in devices() {
        let engine = Engine::load(folder.path(), device, Limits::default()).unwrap();
        let expected = score(&load_on(device, "f32-tied"), &IDS, None).unwrap();
        assert_eq!(score(&engine, &IDS, None).unwrap(), expected);
    }
}

/// Windows of 8 positions, in some layers or all, in contexts of 256.
const WINDOWED: [&str; 4] = ["f32-gemma3", "f32-exaone4", "f32-olmo3", "f32-cohere2"];

fn prompt(tokens: usize) -> Vec<u32> {
    (0..tokens as u32).map(|place| (place * 37 + 5) % 256).collect()
}

#[test]
fn what_a_window_does_not_see_is_let_go_and_not_missed() {
    on_every_device(|device| {
        for case in WINDOWED {
            let load = |chunk| {
                let limits = Limits { prefill_chunk: chunk, ..Limits::default() };
                Engine::load(&parity(case), device, limits).unwrap()
            };
            let (whole, chunks) = (load(512), load(16));
            let ids = prompt(240);
            let [one, other] = [&whole, &chunks].map(|engine| score(engine, &ids, None).unwrap());
            let off = one.iter().zip(&other).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off < 1e-4, "{device:?} {case}: {off} between chunks and the whole");
            let answers = [&whole, &chunks]
                .map(|engine| generate(engine, ids_request(&prompt(150), 90)).unwrap().ids);
            assert_eq!(answers[0], answers[1], "{device:?} {case}");
        }
    });
}

#[test]
fn the_prefix_cache_knows_what_is_gone() {
    on_every_device(|device| {
        for case in WINDOWED {
            let load = |prefix_cache| {
                let limits = Limits { prefix_cache, prefill_chunk: 32, ..Limits::default() };
                Engine::load(&parity(case), device, limits).unwrap()
            };
            let (engine, fresh) = (load(Limits::default().prefix_cache), load(0));
            let ask = |engine: &Engine, ids: &[u32]| {
                let running = start(engine, ids_request(ids, 12)).unwrap();
                let (answer, usage, _) = running.wait_for_all().unwrap();
                (answer.ids, usage.cached_tokens)
            };
            let mut conversation = prompt(180);
            let (answer, cached) = ask(&engine, &conversation);
            assert_eq!(cached, 0);
            // On from the end, where the window is still there.
            let known = conversation.len() + answer.len() - usize::from(answer.len() == 12);
            conversation.extend(answer);
            conversation.extend([7, 8, 9]);
            let expected = ask(&fresh, &conversation).0;
            assert_eq!(ask(&engine, &conversation), (expected, known), "{device:?} {case}");
            // From the middle, where it is gone in some layers.
            let mut other = prompt(40);
            other.extend([1, 2, 3]);
            let (expected, (answer, cached)) = (ask(&fresh, &other).0, ask(&engine, &other));
            assert_eq!(answer, expected, "{device:?} {case}: {cached} cached");
        }
    });
}

/// What mlx-lm and others look for, they find where the model's own files have it.
#[test]
fn a_saved_wrapper_keeps_its_names() {
    let (folder, saved) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut inner = config("f32-dense");
    let eos = inner.as_object_mut().unwrap().remove("eos_token_id").unwrap();
    let outer = json!({ "model_type": "llava", "eos_token_id": eos, "text_config": inner });
    write_config(folder.path(), &outer);
    let prefixed = |name: &str| Some(format!("language_model.{name}"));
    renamed("f32-dense", folder.path(), prefixed, &["vision_tower.a.weight"]);
    let (config, tensors) = weights::open(folder.path()).unwrap();
    let layout = Quantization { group_size: 32, bits: 8 };
    let to = saved.path().join("model");
    save(folder.path(), (&config, &tensors), Some(layout), &to, false).unwrap();
    let names = TensorFile::open(&to.join("model.safetensors")).unwrap().names();
    assert!(names.iter().all(|name| name.starts_with("language_model.model.")), "{names:?}");
    assert!(names.contains(&"language_model.model.layers.0.mlp.up_proj.scales".to_owned()));
    for device in devices() {
        let [own, theirs] = [&to, &parity("f32-dense")].map(|folder| {
            let engine = Engine::load(folder, device, Limits::default()).unwrap();
            score(&engine, &IDS, None).unwrap()
        });
        let off = own.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).sum::<f32>() / 23.0;
        assert!(off > 0.0 && off < 0.1, "{device:?}: 8 bits are {off} from float32");
    }
}
