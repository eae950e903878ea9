//! The engine under load: what is kept for others, limits of some requests, faults, and options
//! that look at what was generated.
//!
//! The gauges are the process's, so these tests run one after another.

#![allow(clippy::unwrap_used)]

mod common;

use bombus::backend::Device;
use bombus::engine::scheduler::Limits;
use bombus::engine::{Engine, Event, Fault, Group, Prompt, Request, Step};
use bombus::error::{Error, Result};
use bombus::runtime::metrics::{KV_BYTES, PREFIX_BYTES, SEQUENCES};
use bombus::sampler::Sampling;
use bombus::tokenizer::Tokenizer;
use common::*;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::channel;

fn prompt(tokens: usize) -> Vec<u32> {
    (0..tokens as u32).map(|place| (place * 37 + 5) % 256).collect()
}

/// -> the answer's ids, and how many tokens of the prompt came from the cache
fn ask(engine: &Engine, request: Request) -> (Vec<u32>, usize) {
    let (answer, usage, _) = start(engine, request).unwrap().wait_for_all().unwrap();
    (answer.ids, usage.cached_tokens)
}

#[test]
fn the_next_turn_of_a_conversation_computes_what_is_new() {
    on_every_device(|device| {
        let engine = load_with(device, Limits::default());
        let fresh = load_with(device, Limits { prefix_cache: 0, ..Limits::default() });
        let mut conversation = prompt(100);
        let mut known = 0;
        for turn in 0..4 {
            let (answer, cached) = ask(&engine, ids_request(&conversation, 20));
            assert_eq!(cached, known, "turn {turn}");
            assert_eq!(ask(&fresh, ids_request(&conversation, 20)), (answer.clone(), 0));
            // Where none ended the text, the last token was not fed.
            known = conversation.len() + answer.len() - usize::from(answer.len() == 20);
            conversation.extend(answer);
            conversation.extend(&prompt(30 + turn)[..]);
        }
        // Another way on from the middle, and the same again.
        let mut other = conversation[..150].to_vec();
        other.extend([9, 9, 9]);
        let expected = ask(&fresh, ids_request(&other, 20)).0;
        assert_eq!(ask(&engine, ids_request(&other, 20)), (expected.clone(), 150));
        assert_eq!(ask(&engine, ids_request(&other, 20)), (expected, 152));
        assert_eq!(KV_BYTES.load(Relaxed), 0);
        assert!(PREFIX_BYTES.load(Relaxed) > 0);
        drop(engine);
        drop(fresh);
    });
}

#[test]
fn a_crowd_with_one_beginning_answers_as_alone() {
    on_every_device(|device| {
        let fresh = load_with(device, Limits { prefix_cache: 0, ..Limits::default() });
        let engine = load_with(device, Limits { max_batch_size: 4, ..Limits::default() });
        let request = |visitor: u32| {
            let mut ids = prompt(90);
            ids.extend([visitor, visitor + 1]);
            let mut request = ids_request(&ids, 10 + visitor as usize);
            request.sampling =
                Sampling { temperature: 0.9, seed: visitor.into(), ..Sampling::default() };
            request
        };
        ask(&engine, ids_request(&prompt(90), 1));
        let crowd: Vec<_> = (0..16).map(|v| start(&engine, request(v)).unwrap()).collect();
        for (visitor, running) in crowd.into_iter().enumerate() {
            let (answer, usage, _) = running.wait_for_all().unwrap();
            assert_eq!(usage.cached_tokens, 90);
            assert_eq!(answer.ids, ask(&fresh, request(visitor as u32)).0, "visitor {visitor}");
        }
    });
}

#[test]
fn an_adapters_keys_and_values_are_its_own() {
    on_every_device(|device| {
        let engine = load_with(device, Limits::default());
        let fresh = load_with(device, Limits { prefix_cache: 0, ..Limits::default() });
        let one = adapter(ENDLESS, "all-layers");
        let with = |adapter: Option<Arc<_>>| {
            let mut request = ids_request(&prompt(60), 12);
            request.adapter = adapter;
            request
        };
        for adapter in [None, Some(one.clone()), Some(adapter(ENDLESS, "head")), None] {
            ask(&engine, with(adapter.clone()));
            let (answer, cached) = ask(&engine, with(adapter.clone()));
            assert_eq!(cached, 59);
            assert_eq!(answer, ask(&fresh, with(adapter)).0);
        }
        let first = ask(&load_with(device, Limits::default()), with(Some(one)));
        assert_eq!(first.1, 0);
    });
}

#[test]
fn what_is_kept_stays_within_its_budget() {
    on_every_device(|device| {
        let budget = 1 << 20;
        let engine = load_with(device, Limits { prefix_cache: budget, ..Limits::default() });
        for beginning in 0..40 {
            let mut ids = vec![beginning; 5];
            ids.extend(prompt(200));
            ask(&engine, ids_request(&ids, 2));
            assert!((1..=budget).contains(&PREFIX_BYTES.load(Relaxed)));
        }
        let mut first = vec![0; 5];
        first.extend(prompt(200));
        assert_eq!(ask(&engine, ids_request(&first, 2)).1, 0);
        assert_eq!(ask(&engine, ids_request(&first, 2)).1, 204);
    });
}

#[test]
fn a_long_prompt_holds_up_nobody_for_more_than_a_chunk() {
    on_every_device(|device| {
        let limits = Limits { prefill_chunk: 16, ..Limits::default() };
        let engine = load_with(device, limits);
        let (sender, steps) = channel::<Step>();
        engine.watch(Box::new(move |step| sender.send(step).is_ok()));
        let stream = start(&engine, ids_request(&prompt(5), 400)).unwrap();
        assert!(matches!(stream.events.recv().unwrap(), Event::Chunk { .. }));
        let long = start(&engine, ids_request(&prompt(400), 1)).unwrap();
        long.wait().unwrap();
        drop(stream);
        drop(engine);
        let steps: Vec<Step> = steps.iter().collect();
        assert!(steps.iter().all(|step| step.rows <= 16 + 1));
        // The stream has its row beside every chunk.
        let beside = steps.iter().filter(|step| step.sequences == 2 && step.rows > 2).count();
        assert_eq!(beside, 400 / 16);
    });
}

#[test]
fn a_group_has_limits_of_its_own() {
    on_every_device(|device| {
        let engine = load_with(device, Limits::default());
        let limits = Limits { max_batch_size: 1, max_queue: 2, ..Limits::default() };
        let group = Arc::new(Group::new(limits));
        let request = |grouped: bool, tokens| {
            let mut request = ids_request(&prompt(5), tokens);
            request.group = grouped.then(|| group.clone());
            request
        };
        let started: Vec<Result<Running>> =
            (0..6).map(|_| start(&engine, request(true, 400))).collect();
        let (started, refused): (Vec<_>, Vec<_>) = started.into_iter().partition(Result::is_ok);
        assert!(started.len() >= 2 && refused.len() >= 3, "{}", started.len());
        assert!(refused.iter().all(|refused| matches!(refused, Err(Error::Overloaded(3)))));
        // Others pass.
        generate(&engine, request(false, 3)).unwrap();
        let (sender, steps) = channel::<Step>();
        engine.watch(Box::new(move |step| sender.send(step).is_ok()));
        let answers = started.into_iter().map(|running| running.unwrap().wait().unwrap().ids);
        let answers: Vec<_> = answers.collect();
        assert!(answers.iter().all(|answer| *answer == answers[0]));
        drop(engine);
        assert!(steps.iter().all(|step| step.sequences <= 1));
    });
}

#[test]
fn a_fault_in_a_step_fails_its_sequences_and_the_engine_serves_on() {
    on_every_device(|device| {
        let engine = load_with(device, Limits { max_batch_size: 3, ..Limits::default() });
        let expected = generate(&engine, ids_request(&prompt(5), 30)).unwrap();
        for fault in [Fault::Panic, Fault::Error] {
            let running: Vec<_> =
                (0..3).map(|_| start(&engine, ids_request(&prompt(5), 400)).unwrap()).collect();
            for running in &running {
                assert!(matches!(running.events.recv().unwrap(), Event::Chunk { .. }));
            }
            let waiting = start(&engine, ids_request(&prompt(5), 30)).unwrap();
            engine.fail_next_step(fault);
            for running in running {
                match (fault, running.wait()) {
                    (Fault::Panic, Err(Error::Panic(_))) => {}
                    (Fault::Error, Err(Error::Backend(_))) => {}
                    other => panic!("{other:?}"),
                }
            }
            // Who was not part of the step is answered, from nothing that the fault has touched.
            let (answer, usage, _) = waiting.wait_for_all().unwrap();
            assert_eq!((answer, usage.cached_tokens), (expected.clone(), 0));
            assert_eq!(SEQUENCES.load(Relaxed) + KV_BYTES.load(Relaxed), 0);
        }
    });
}

#[test]
fn logprobs_are_what_the_text_scores() {
    on_every_device(|device| {
        let engine = load_with(device, Limits::default());
        let mut request = ids_request(&prompt(20), 30);
        // What changes the choice does not change what is reported.
        request.sampling = Sampling {
            temperature: 1.5,
            repetition_penalty: 1.3,
            presence_penalty: 0.5,
            seed: 3,
            logprobs: Some(4),
            ..Sampling::default()
        };
        let (answer, _, logprobs) = start(&engine, request).unwrap().wait_for_all().unwrap();
        assert_eq!(logprobs.len(), 30);
        let mut ids = prompt(20);
        ids.extend(&answer.ids);
        let scores = score(&engine, &ids, None).unwrap();
        for (logprobs, score) in logprobs.iter().zip(&scores[19..]) {
            assert!((logprobs.chosen - score).abs() < 1e-3, "{} {score}", logprobs.chosen);
            assert_eq!(logprobs.top.len(), 4);
            assert!(logprobs.top.is_sorted_by(|a, b| a.1 >= b.1));
            assert!(logprobs.top[0].1 >= logprobs.chosen);
        }
    });
}

/// How far float order moves a token's ln p in a batch, and behind a beginning that is cached: what
/// `Bombus.Serving` says of it.
#[test]
fn a_crowd_moves_log_probabilities_by_rounding_alone() {
    on_every_device(|device| {
        let bounds = match device {
            // It multiplies row by row.
            #[cfg(feature = "mlx")]
            Device::Mlx(bombus::backend::mlx::Device::Cpu) => [1e-6, 1e-6, 1e-6],
            // Other numbers of rows are other products, and their results are rounded to 16 bits: a logit of 8 to
            // 16 to a 128th in f16, to a 16th in bf16 (there only a prompt's: Bombus's own kernel makes the steps).
            #[cfg(feature = "mlx")]
            Device::Mlx(bombus::backend::mlx::Device::Gpu) => [1e-4, 0.04, 0.15],
            Device::Cpu(_) => [1e-4, 5e-3, 5e-3],
        };
        for (case, bound) in [ENDLESS, "f16-4bit", "bf16-4bit"].into_iter().zip(bounds) {
            let load = |limits| Engine::load(&parity(case), device, limits).unwrap();
            let fresh = load(Limits { prefix_cache: 0, ..Limits::default() });
            let engine = load(Limits { prefill_chunk: 7, ..Limits::default() });
            // The same tokens everywhere: the model has no choice.
            let request = |length: usize| {
                let mut request = ids_request(&prompt(length), 20);
                request.sampling.logprobs = Some(0);
                request.sampling.logit_bias = vec![(77, 1e6)];
                request
            };
            ask(&engine, request(20));
            let crowd: Vec<_> =
                (30..38).map(|length| start(&engine, request(length)).unwrap()).collect();
            let mut worst = 0f32;
            for (length, running) in (30..38).zip(crowd) {
                let (_, usage, logprobs) = running.wait_for_all().unwrap();
                assert_eq!((usage.cached_tokens, logprobs.len()), (20, 20));
                let alone = start(&fresh, request(length)).unwrap().wait_for_all().unwrap().2;
                let distances = logprobs
                    .iter()
                    .zip(alone)
                    .map(|(one, other)| (one.chosen - other.chosen).abs());
                worst = distances.fold(worst, f32::max);
            }
            println!("{device:?} {case}: {worst}");
            assert!(worst < bound, "{device:?} {case}: {worst}");
        }
    });
}

#[test]
fn penalties_and_biases_look_at_what_was_generated() {
    on_every_device(|device| {
        let engine = load_with(device, Limits::default());
        let answer = |sampling: Sampling| {
            let mut request = ids_request(&prompt(20), 40);
            request.sampling = sampling;
            generate(&engine, request).unwrap().ids
        };
        let different = |ids: &[u32]| ids.iter().collect::<std::collections::HashSet<_>>().len();
        let plain = answer(Sampling::default());
        assert!(different(&plain) < 40);
        for (presence_penalty, frequency_penalty) in [(1e4, 0.0), (0.0, 1e4)] {
            let sampling = Sampling { presence_penalty, frequency_penalty, ..Sampling::default() };
            assert_eq!(different(&answer(sampling)), 40);
        }
        let sampling = Sampling { logit_bias: vec![(77, 1e4)], ..Sampling::default() };
        assert_eq!(answer(sampling), [77; 40]);
        let banned = Sampling { logit_bias: vec![(plain[0], -1e4)], ..Sampling::default() };
        assert!(!answer(banned).contains(&plain[0]));
        let outside = Sampling { logit_bias: vec![(99_999, 1.0)], ..Sampling::default() };
        let mut request = ids_request(&prompt(3), 3);
        request.sampling = outside;
        assert!(matches!(generate(&engine, request), Err(Error::Request(_))));
    });
}

fn demo(device: Device) -> (Engine, Request) {
    let folder = repository().join("priv/models/demo");
    let engine = Engine::load(&folder, device, Limits::default()).unwrap();
    let messages = r#"[{"role": "user", "content": "Write a post about coffee"}]"#.into();
    let mut request = Request::new(Prompt::Chat { messages, options: "{}".into() }, 300);
    request.tokenizer = Some(Arc::new(Tokenizer::open(&folder).unwrap()));
    (engine, request)
}

#[test]
fn a_text_does_not_end_before_it_may() {
    on_every_device(|device| {
        let (engine, request) = demo(device);
        let usual = generate(&engine, request).unwrap().ids;
        let mut request = demo(device).1;
        request.min_new_tokens = usual.len() + 20;
        let longer = generate(&engine, request).unwrap().ids;
        assert!(longer.len() >= usual.len() + 20, "{} {}", longer.len(), usual.len());
        assert_eq!(longer[..usual.len()], usual);
    });
}

#[test]
fn a_request_that_is_cancelled_at_once_has_one_end() {
    on_every_device(|device| {
        let engine = demo(device).0;
        for _ in 0..50 {
            let running = start(&engine, demo_request()).unwrap();
            running.generation.cancel();
            let ends = running.events.iter().filter(|event| !matches!(event, Event::Chunk { .. }));
            assert_eq!(ends.count(), 1);
        }
        assert_eq!(SEQUENCES.load(Relaxed) + KV_BYTES.load(Relaxed), 0);
    });
}

fn demo_request() -> Request {
    let folder = repository().join("priv/models/demo");
    let mut request = Request::new(Prompt::Text("Tea and ".repeat(200)), 50);
    request.tokenizer = Some(Arc::new(Tokenizer::open(&folder).unwrap()));
    request
}
