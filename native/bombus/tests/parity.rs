//! Log-probabilities and greedy tokens beside mlx-lm's, on the checkpoints and adapters that
//! `scripts/make_fixtures.py` made.
//!
//! Adapters in PEFT's format are compared with PEFT's own model in float32.
//!
//! float32: every log-probability within 1e-3 of mlx-lm's. With bf16 or f16 scales mlx-lm is
//! itself off the exact answer: there the mean distance to mlx-lm is at most 0.02, or the mean
//! distance to the exact answer at most 1.25 times mlx-lm's own plus 0.01.

#![allow(clippy::unwrap_used)]

mod common;

use bombus::backend::Device;
use bombus::backend::cpu::Options;
use bombus::engine::Engine;
use bombus::engine::scheduler::Limits;
use bombus::model::adapter::Adapter;
use common::*;
use serde_json::Value;
use std::sync::Arc;

/// All, or those that BOMBUS_TEST_CASES names (`bf16-4bit,f32-dense`): MLX compiles for minutes on a card, and
/// processes side by side do not wait for each other.
fn cases() -> Vec<String> {
    let folder = parity("");
    let entries = std::fs::read_dir(&folder).unwrap();
    let mut cases: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    cases.sort();
    assert!(cases.len() >= 15, "{} has too few cases", folder.display());
    if let Ok(wanted) = std::env::var("BOMBUS_TEST_CASES") {
        cases.retain(|case| wanted.split(',').any(|name| name == case));
        assert!(!cases.is_empty(), "there is no case in {wanted}");
    }
    cases
}

fn expected(case: &str) -> Value {
    let text = std::fs::read(parity(case).join("expected.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn floats(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

/// The runs of a case, each with its adapter.
fn runs(case: &str, expected: &Value) -> Vec<(String, Option<Arc<Adapter>>, Value)> {
    let mut runs = vec![];
    for (name, run) in expected["runs"].as_object().unwrap() {
        let adapter = name.strip_prefix("adapter:").map(|name| adapter(case, name));
        runs.push((format!("{case} {name}"), adapter, run.clone()));
    }
    runs
}

fn mean_distance(one: &[f64], other: &[f64]) -> f64 {
    assert_eq!(one.len(), other.len());
    one.iter().zip(other).map(|(a, b)| (a - b).abs()).sum::<f64>() / one.len() as f64
}

/// What is wrong with the scores of a run, if anything is.
fn fault(name: &str, dtype: &str, scored: &[f64], run: &Value) -> Option<String> {
    let mlx = floats(&run["logprobs"]);
    if dtype == "float32" {
        assert_eq!(scored.len(), mlx.len(), "{name}");
        let worst = scored.iter().zip(&mlx).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        return (worst > 1e-3).then(|| format!("{name}: {worst} from mlx-lm"));
    }
    let to_mlx = mean_distance(scored, &mlx);
    let exact = floats(&run["exact"]);
    let (own, its) = (mean_distance(scored, &exact), mean_distance(&mlx, &exact));
    let close = to_mlx <= 0.02 || own <= 1.25 * its + 0.01;
    (!close).then(|| {
        format!("{name}: {to_mlx} from mlx-lm, {own} from the exact answer (mlx-lm: {its})")
    })
}

#[test]
fn log_probabilities_are_mlx_lms() {
    let mut faults = vec![];
    for (device, case) in
        all_devices().into_iter().flat_map(|d| cases().into_iter().map(move |c| (d, c)))
    {
        let expected = expected(&case);
        let engine = load_on(device, &case);
        for (name, adapter, run) in runs(&case, &expected) {
            let scored = score(&engine, &ids(&expected["token_ids"]), adapter).unwrap();
            let scored: Vec<f64> = scored.into_iter().map(f64::from).collect();
            let dtype = expected["dtype"].as_str().unwrap();
            faults.extend(fault(&format!("{device:?} {name}"), dtype, &scored, &run));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// On a card, cases that are named so go through one kernel for all layers: others' scores would be
/// right without it.
#[test]
fn the_fused_step_serves_what_it_is_for() {
    let fused = |case: &String| {
        case.ends_with("-fused") || ["bf16-4bit", "bf16-mistral", "bf16-qwen2"].contains(&&**case)
    };
    for (device, case) in
        devices().into_iter().flat_map(|d| cases().into_iter().filter(fused).map(move |c| (d, c)))
    {
        assert_eq!(load_on(device, &case).fallback(), None, "{device:?} {case}");
    }
}

/// Adapters in PEFT's format beside PEFT's own model (`scripts/make_peft_fixtures.py`), and DoRA of
/// an embedding and a head beside mlx-lm's (`scripts/make_dora_fixtures.py`).
#[test]
fn adapters_of_other_kinds_score_as_their_makers_do() {
    let files = [
        ("f32-dense", "expected_peft.json", 7),
        ("f32-dense", "expected_dora.json", 1),
        ("f32-untied", "expected_dora.json", 1),
    ];
    let mut faults = vec![];
    for (device, (case, file, count)) in
        all_devices().into_iter().flat_map(|device| files.map(|file| (device, file)))
    {
        let text = std::fs::read(parity(case).join(file)).unwrap();
        let runs: serde_json::Map<String, Value> = serde_json::from_slice(&text).unwrap();
        assert_eq!(runs.len(), count);
        let engine = load_on(device, case);
        for (name, theirs) in &runs {
            let ids = ids(&expected(case)["token_ids"]);
            let scored = score(&engine, &ids, Some(adapter(case, name))).unwrap();
            let distances =
                scored.iter().zip(floats(theirs)).map(|(a, b)| (f64::from(*a) - b).abs());
            let worst = distances.fold(0.0, f64::max);
            if worst > 1e-3 {
                faults.push(format!("{device:?} {case} {name}: {worst} from {file}"));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn greedy_tokens_are_mlx_lms_all_runs_in_one_batch() {
    for (device, case) in
        all_devices().into_iter().flat_map(|d| cases().into_iter().map(move |c| (d, c)))
    {
        let expected = expected(&case);
        let engine = load_on(device, &case);
        let prompt = ids(&expected["greedy_prompt"]);
        let runs = runs(&case, &expected);
        let request = |adapter: &Option<Arc<Adapter>>| {
            let mut request = ids_request(&prompt, 16);
            request.adapter = adapter.clone();
            request
        };
        let running: Vec<_> =
            runs.iter().map(|(_, adapter, _)| start(&engine, request(adapter)).unwrap()).collect();
        for (running, (name, _, run)) in running.into_iter().zip(&runs) {
            let answer = running.wait().unwrap().ids;
            let mut agreed = ids(&run["greedy"]);
            agreed.truncate(run["greedy_agreed"].as_u64().unwrap() as usize);
            // The engine ends at an eos token, which is not part of the answer.
            let eos = engine.config().eos_token_ids.clone();
            let end = agreed.iter().position(|id| eos.contains(id)).unwrap_or(agreed.len());
            assert_eq!(answer[..end.min(answer.len())], agreed[..end], "{name}");
            assert!(end == agreed.len() || answer.len() == end, "{name}: it did not end at eos");
        }
    }
}

/// Each token in a step of its own, behind what the step before left: as a text is generated.
#[test]
fn tokens_one_by_one_score_as_mlx_lms() {
    let mut faults = vec![];
    for (device, case) in devices().into_iter().flat_map(|d| CASES.map(|case| (d, case))) {
        let expected = expected(case);
        let engine = load_on(device, case);
        let all = ids(&expected["token_ids"]);
        for (name, adapter, run) in runs(case, &expected) {
            let scored: Vec<f64> = (1..all.len())
                .map(|end| f64::from(log_prob(&engine, &all[..end], all[end], adapter.clone())))
                .collect();
            let dtype = expected["dtype"].as_str().unwrap();
            faults.extend(fault(&format!("{device:?} {name}"), dtype, &scored, &run));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// Twelve at once, more than a tile of the tensor cores has rows, with adapters and without, and their prompts
/// in chunks beside them: as close to the exact answer as MLX's scores of the same texts are, which take
/// all tokens of one text at once. The CPU backend's are exact.
#[test]
fn a_crowd_in_bfloat16_is_as_close_as_scores_are() {
    let models = repository().join("priv/models");
    let open = |name| Arc::new(Adapter::open(&models.join("adapters").join(name), None).unwrap());
    let adapters = [None, Some(open("pirate")), Some(open("news"))];
    let limits = Limits { prefill_chunk: 16, ..Limits::default() };
    let load = |device| Engine::load(&models.join("demo"), device, limits.clone()).unwrap();
    let exact = load(Device::Cpu(Options::default()));
    for device in devices() {
        let engine = load(device);
        let prompt = |seed: usize| -> Vec<u32> {
            (0..3 + 6 * seed).map(|at| ((at * 37 + seed * 11) % 1000) as u32).collect()
        };
        let request = |seed: usize| {
            let mut request = ids_request(&prompt(seed), 10);
            request.sampling.logprobs = Some(0);
            request.adapter = adapters[seed % 3].clone();
            request
        };
        let crowd: Vec<_> = (0..12).map(|seed| start(&engine, request(seed)).unwrap()).collect();
        let (mut own, mut scored, mut right) = (vec![], vec![], vec![]);
        for (seed, running) in crowd.into_iter().enumerate() {
            let (answer, _, logprobs) = running.wait_for_all().unwrap();
            let text = [prompt(seed), answer.ids.clone()].concat();
            let scores = |engine| {
                let scores = score(engine, &text, adapters[seed % 3].clone()).unwrap();
                scores[scores.len() - answer.ids.len()..].iter().map(|it| f64::from(*it)).collect()
            };
            own.extend(logprobs.iter().map(|it| f64::from(it.chosen)));
            scored.extend::<Vec<f64>>(scores(&engine));
            right.extend::<Vec<f64>>(scores(&exact));
        }
        assert!(own.len() > 60, "{device:?}: {}", own.len());
        let (off, usual) = (mean_distance(&own, &right), mean_distance(&scored, &right));
        println!("{device:?}: {off}, scores {usual}");
        assert!(
            off <= 1.25 * usual + 0.01,
            "{device:?}: {off} from the exact answer, scores {usual}"
        );
    }
}

/// One in float32, and one that the kernels for NVIDIA cards serve.
const CASES: [&str; 2] = ["bf16-4bit", "f32-untied"];

/// ln p of `next` behind a prompt, of which all but the last token is known from the request before.
fn log_prob(engine: &Engine, prompt: &[u32], next: u32, adapter: Option<Arc<Adapter>>) -> f32 {
    let mut request = ids_request(prompt, 1);
    request.sampling.logprobs = Some(1000);
    request.min_new_tokens = 1;
    request.adapter = adapter;
    let (_, usage, logprobs) = start(engine, request).unwrap().wait_for_all().unwrap();
    assert_eq!(usage.cached_tokens, prompt.len() - 1);
    let tops = &logprobs[0].top;
    tops.iter().find(|(id, _)| *id == next).unwrap().1
}
