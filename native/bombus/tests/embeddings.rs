//! Embeddings and judgements of texts beside mlx-lm's hidden states, on the checkpoints that
//! `scripts/make_embedding_fixtures.py` chose: in float32 every number within 1e-3.

#![allow(clippy::unwrap_used)]

mod common;

use bombus::backend::Device;
use bombus::engine::scheduler::Limits;
use bombus::engine::{Engine, Fault, Pooling, Wanted};
use bombus::error::Error;
use bombus::runtime::metrics::{KV_BYTES, SEQUENCES};
use common::*;
use serde_json::Value;
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

const CASES: [&str; 6] =
    ["f32-tied", "f32-untied", "f32-dense", "f32-8bit-g32", "f32-llama", "f32-qwen2"];

fn expected(case: &str) -> Value {
    let text = std::fs::read(parity(case).join("expected_embeddings.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

fn texts(expected: &Value) -> Vec<Vec<u32>> {
    serde_json::from_value(expected["texts"].clone()).unwrap()
}

fn judgement(expected: &Value) -> Wanted {
    let id = |name: &str| expected[name].as_u64().unwrap() as u32;
    Wanted::Judgement { yes: id("yes"), no: id("no") }
}

/// A vector for each text, or a number.
fn right(values: &Value) -> Vec<Vec<f32>> {
    let number = |value: &Value| value.as_f64().unwrap() as f32;
    let vector = |value: &Value| match value.as_array() {
        Some(numbers) => numbers.iter().map(number).collect(),
        None => vec![number(value)],
    };
    values.as_array().unwrap().iter().map(vector).collect()
}

fn worst(one: &[Vec<f32>], other: &[Vec<f32>]) -> f32 {
    assert_eq!(one.len(), other.len());
    let pairs = one.iter().zip(other).flat_map(|(one, other)| {
        assert_eq!(one.len(), other.len());
        one.iter().zip(other)
    });
    pairs.map(|(one, other)| (one - other).abs()).fold(0.0, f32::max)
}

/// Texts of all lengths, the longest of several chunks.
fn mixed() -> Vec<Vec<u32>> {
    let text = |length: u32| (0..length).map(|at| (at * 37 + length * 11) % 256).collect();
    [1, 30, 2, 300, 7, 1, 64, 65, 5].into_iter().map(text).collect()
}

fn all_free() -> bool {
    SEQUENCES.load(Relaxed) == 0 && KV_BYTES.load(Relaxed) == 0
}

#[test]
fn texts_give_what_mlx_lm_gives() {
    let _alone = alone();
    let mut faults = vec![];
    for (device, case) in all_devices().into_iter().flat_map(|d| CASES.map(|case| (d, case))) {
        let expected = expected(case);
        let engine = load_on(device, case);
        for (name, run) in expected["runs"].as_object().unwrap() {
            let own = name.strip_prefix("adapter:").map(|name| adapter(case, name));
            for (what, wanted) in
                [("last", LAST), ("mean", MEAN), ("judgements", judgement(&expected))]
            {
                let mut request = texts_request(&texts(&expected), wanted);
                request.adapter = own.clone();
                let given = vectors(&start_embed(&engine, request).unwrap()).unwrap();
                let right = right(&run[what]);
                let off = worst(&given, &right);
                if off > 1e-3 {
                    faults.push(format!("{device:?} {case} {name} {what}: {off}"));
                }
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// With an adapter and without, embeddings and judgements, all at once, and beside a text that is
/// being generated: as each text alone, in one piece.
#[test]
fn texts_of_many_callers_in_chunks_are_as_each_alone() {
    on_every_device(|device| {
        let whole = load_with(device, Limits::default());
        let limits = Limits { prefill_chunk: 48, ..Limits::default() };
        let engine = load_with(device, limits);
        let mut endless = ids_request(&[3, 1, 4], 400);
        endless.min_new_tokens = 400;
        let beside = start(&engine, endless).unwrap();
        let adapters = [None, Some(adapter(ENDLESS, "all-layers")), None];
        let judge = Wanted::Judgement { yes: 17, no: 201 };
        let kinds = [LAST, MEAN, judge];
        let requests: Vec<_> =
            (0..9).map(|caller| (kinds[caller % 3], adapters[caller / 3].clone())).collect();
        let running = requests.iter().map(|(wanted, adapter)| {
            let mut request = texts_request(&mixed(), *wanted);
            request.adapter = adapter.clone();
            start_embed(&engine, request).unwrap()
        });
        let running: Vec<_> = running.collect();
        for (running, (wanted, adapter)) in running.iter().zip(requests) {
            let given = vectors(running).unwrap();
            let alone = mixed().into_iter().map(|text| {
                let mut request = texts_request(&[text], wanted);
                request.adapter = adapter.clone();
                vectors(&start_embed(&whole, request).unwrap()).unwrap().remove(0)
            });
            let off = worst(&given, &alone.collect::<Vec<_>>());
            assert!(off < 1e-4, "{device:?} {wanted:?}: {off}");
        }
        assert_eq!(beside.wait().unwrap().ids.len(), 400);
        drop((engine, whole));
    });
}

#[test]
fn a_vector_is_cut_and_then_as_long_as_one() {
    on_every_device(|device| {
        let engine = load_with(device, Limits::default());
        let wanted = |dimensions, normalize| Wanted::Embedding {
            pooling: Pooling::Mean,
            normalize,
            dimensions,
        };
        let whole = embed(&engine, &mixed(), MEAN).unwrap();
        let cut = embed(&engine, &mixed(), wanted(Some(24), false)).unwrap();
        let normal = embed(&engine, &mixed(), wanted(Some(24), true)).unwrap();
        for ((whole, cut), normal) in whole.iter().zip(cut).zip(normal) {
            assert_eq!(whole[..24], cut);
            let length = cut.iter().map(|number| number * number).sum::<f32>().sqrt();
            let right: Vec<f32> = cut.iter().map(|number| number / length).collect();
            assert!(worst(&[right], &[normal]) < 1e-6);
        }
    });
}

#[test]
fn what_is_wrong_with_a_text_names_it() {
    on_every_device(|device| {
        let engine = load_with(device, Limits { max_context: Some(9), ..Limits::default() });
        let fault = |texts: &[Vec<u32>], wanted| embed(&engine, texts, wanted).unwrap_err();
        let judge = |yes| Wanted::Judgement { yes, no: 2 };
        let long = [vec![1; 9], vec![1; 10], vec![1]];
        let said = "2 of 3: 10 tokens, where the context is 9";
        assert_eq!(fault(&long, LAST), Error::PromptTooLong(format!("text {said}")));
        assert_eq!(fault(&long, judge(1)), Error::PromptTooLong(format!("document {said}")));
        let empty = fault(&[vec![1], vec![]], MEAN);
        assert_eq!(empty, Error::Request("text 2 of 2: the prompt has no tokens".into()));
        assert!(matches!(fault(&[vec![270]], LAST), Error::Request(_)));
        assert!(matches!(fault(&[vec![1]], judge(270)), Error::Request(_)));
        assert!(matches!(fault(&[], LAST), Error::Request(_)));
        for dimensions in [0, 65] {
            let cut = Wanted::Embedding {
                pooling: Pooling::Last,
                normalize: true,
                dimensions: Some(dimensions),
            };
            assert!(matches!(fault(&[vec![1]], cut), Error::Request(_)));
        }
        assert!(embed(&engine, &[vec![1; 9]], LAST).is_ok() && all_free());
    });
}

#[test]
fn texts_end_with_their_time_with_their_caller_and_with_a_fault() {
    on_every_device(|device| {
        let engine = load_with(device, Limits { prefill_chunk: 1, ..Limits::default() });
        let many = |timeout| {
            let mut request = texts_request(&[vec![7; 400], vec![7; 400]], MEAN);
            request.timeout = Some(timeout);
            start_embed(&engine, request).unwrap()
        };
        assert_eq!(vectors(&many(Duration::from_millis(3))), Err(Error::Timeout));
        let long = Duration::from_secs(1000);
        let running = many(long);
        running.generation.cancel();
        assert_eq!(vectors(&running), Err(Error::Stopped));
        drop(many(long));
        for fault in [Fault::Panic, Fault::Error] {
            engine.fail_next_step(fault);
            assert!(matches!(vectors(&many(long)), Err(Error::Panic(_) | Error::Backend(_))));
        }
        let begun = Instant::now();
        while !all_free() {
            assert!(begun.elapsed() < Duration::from_secs(20));
        }
        // An adapter's end is its requests', a model's all of them.
        let own = adapter(ENDLESS, "all-layers");
        let mut request = texts_request(&[vec![7; 400]], LAST);
        request.adapter = Some(own.clone());
        let running = start_embed(&engine, request).unwrap();
        own.cancel();
        assert_eq!(vectors(&running), Err(Error::Stopped));
        let running = many(long);
        engine.unload(true, || {});
        assert_eq!(vectors(&running), Err(Error::Stopped));
        assert!(matches!(embed(&engine, &[vec![1]], LAST), Err(Error::Unloaded(_))));
    });
}

fn bare(name: &str) -> Option<String> {
    name.strip_prefix("model.").map(str::to_owned)
}

fn load(folder: &Path, device: Device) -> Engine {
    Engine::load(folder, device, Limits::default()).unwrap()
}

/// As Qwen3-Embedding is published: names without `model.`, and no head, whatever the configuration
/// says of one.
#[test]
fn checkpoints_for_embeddings_load_as_published() {
    for case in ["f32-tied", "f32-dense", "f32-untied"] {
        let temporary = tempfile::tempdir().unwrap();
        let folder = temporary.path();
        renamed(case, folder, bare, &[]);
        std::fs::copy(parity(case).join("config.json"), folder.join("config.json")).unwrap();
        let saved = folder.join("saved");
        for device in devices() {
            let right = embed(&load_on(device, case), &mixed(), LAST).unwrap();
            let engine = load(folder, device);
            assert_eq!(embed(&engine, &mixed(), LAST).unwrap(), right);
            if case == "f32-untied" {
                let fault = generate(&engine, ids_request(&[1, 2], 3)).unwrap_err();
                assert!(fault.to_string().contains("no `lm_head`"), "{fault}");
                assert_eq!(fault.reason(), "unsupported");
            }
            engine.save(&saved, true).unwrap();
            assert_eq!(embed(&load(&saved, device), &mixed(), LAST).unwrap(), right);
        }
    }
}
