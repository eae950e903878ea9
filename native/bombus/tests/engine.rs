//! The engine without a BEAM: ends of requests, faults, memory.
//!
//! The gauges are the process's, so these tests run one after another.

#![allow(clippy::unwrap_used)]

mod common;

use bombus::backend::Device;
use bombus::backend::cpu::Options;
use bombus::engine::scheduler::Limits;
use bombus::engine::sequence::FinishReason;
use bombus::engine::{Engine, Event, Prompt, Sink};
use bombus::error::{Error, Result};
use bombus::runtime::abandon::Abandoned;
use bombus::runtime::metrics;
use bombus::sampler::Sampling;
use bombus::spec::Quantization;
use bombus::tokenizer::Tokenizer;
use common::*;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};
const PROMPT: [u32; 5] = [3, 1, 4, 1, 5];

#[track_caller]
fn soon(what: impl Fn() -> bool) {
    let start = Instant::now();
    while !what() {
        assert!(start.elapsed() < Duration::from_secs(10), "it did not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// MLX's threads take the name of the one that made them.
#[cfg(target_os = "linux")]
fn threads_named(name: &str) -> usize {
    let named = |task: &std::path::Path| std::fs::read_to_string(task.join("comm"));
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|task| named(&task.ok()?.path()).ok());
    names.filter(|found| found.trim() == name).count()
}

fn was_cancelled(event: &Event, prompt_tokens: usize) -> bool {
    let Event::Done { reason: FinishReason::Cancelled, usage } = event else { return false };
    usage.prompt_tokens == prompt_tokens
}

fn all_free() -> bool {
    metrics::SEQUENCES.load(Relaxed) == 0 && metrics::KV_BYTES.load(Relaxed) == 0
}

#[test]
fn a_request_in_a_crowd_answers_as_alone() {
    on_every_device(|device| {
        let engine =
            load_with(device, Limits { prefill_chunk: 3, max_batch_size: 4, ..Limits::default() });
        let request = |seed: u64| {
            let ids: Vec<u32> = PROMPT.iter().cycle().take(3 + seed as usize).copied().collect();
            let mut request = ids_request(&ids, 12);
            request.sampling =
                Sampling { temperature: 0.9, top_p: 0.9, seed, ..Sampling::default() };
            request
        };
        let crowd: Vec<_> = (0..12).map(|seed| start(&engine, request(seed)).unwrap()).collect();
        let crowd: Vec<_> = crowd.into_iter().map(|running| running.wait().unwrap()).collect();
        for (seed, answer) in crowd.iter().enumerate() {
            assert_eq!(generate(&engine, request(seed as u64)).unwrap(), *answer, "seed {seed}");
        }
    });
}

#[test]
fn a_cancelled_request_has_one_end_and_frees_its_memory() {
    on_every_device(|device| {
        let engine = load_with(device, Limits::default());
        let running = start(&engine, ids_request(&PROMPT, 400)).unwrap();
        let first = running.events.recv().unwrap();
        assert!(matches!(first, Event::Chunk { .. }));
        running.generation.cancel();
        running.generation.cancel();
        let ends: Vec<_> =
            running.events.iter().filter(|event| !matches!(event, Event::Chunk { .. })).collect();
        assert_eq!(ends.len(), 1);
        assert!(was_cancelled(&ends[0], 5), "{ends:?}");
        assert!(all_free());
    });
}

#[test]
fn a_request_that_nobody_hears_or_holds_ends() {
    on_every_device(|device| {
        let engine = load_with(device, Limits::default());
        let unheard = start(&engine, ids_request(&PROMPT, 400)).unwrap();
        let generation = unheard.generation;
        drop(unheard.events);
        soon(all_free);
        drop(generation);
        let running = start(&engine, ids_request(&PROMPT, 400)).unwrap();
        drop(running.generation);
        let last = running.events.iter().last();
        assert!(matches!(last, Some(Event::Done { reason: FinishReason::Cancelled, .. })));
    });
}

#[test]
fn the_engine_outlives_its_handle_only_while_something_is_generated() {
    on_every_device(|device| {
        let models = metrics::MODELS.load(Relaxed);
        let engine = load_with(device, Limits::default());
        let running = start(&engine, ids_request(&PROMPT, 50)).unwrap();
        drop(engine);
        assert_eq!(running.wait().unwrap().ids.len(), 50);
        soon(|| metrics::MODELS.load(Relaxed) == models);
    });
}

#[test]
fn a_full_queue_refuses_at_once_and_its_places_come_back() {
    on_every_device(|device| {
        let engine =
            load_with(device, Limits { max_queue: 2, max_batch_size: 1, ..Limits::default() });
        let started: Vec<Result<Running>> =
            (0..10).map(|_| start(&engine, ids_request(&PROMPT, 100))).collect();
        let (started, refused): (Vec<_>, Vec<_>) = started.into_iter().partition(Result::is_ok);
        assert!(started.len() >= 2 && refused.len() >= 6);
        assert!(matches!(refused[0], Err(Error::Overloaded(3))));
        drop(refused);
        started.into_iter().for_each(|running| drop(running.unwrap()));
        // Each place comes back when the engine has taken the request's command.
        let answer = || generate(&engine, ids_request(&PROMPT, 3));
        soon(|| answer().is_ok_and(|answer| answer.ids.len() == 3));
        soon(all_free);
    });
}

#[test]
fn a_refusal_at_once_is_the_only_answer() {
    on_every_device(|device| {
        let engine = load_with(device, Limits::default());
        let (sender, events) = std::sync::mpsc::channel();
        let listener = Sink::new(move |event| sender.send(event).is_ok());
        let mut request = ids_request(&PROMPT, 5);
        request.sampling.temperature = -1.0;
        assert!(matches!(engine.generate(request, listener), Err(Error::Request(_))));
        assert_eq!(events.iter().count(), 0);
    });
}

#[test]
fn one_bad_request_never_harms_the_others() {
    on_every_device(|device| {
        let engine = load_with(device, Limits::default());
        let expected = generate(&engine, ids_request(&PROMPT, 40)).unwrap();
        let good = start(&engine, ids_request(&PROMPT, 40)).unwrap();
        let wrong = |ids: &[u32]| generate(&engine, ids_request(ids, 5)).unwrap_err();
        assert!(matches!(wrong(&[]), Error::Request(_)));
        assert!(matches!(wrong(&[1, 99_999]), Error::Request(_)));
        assert!(matches!(wrong(&[1; 4000]), Error::PromptTooLong(_)));
        let mut text = ids_request(&[], 5);
        text.prompt = Prompt::Text("hello".into());
        assert!(matches!(generate(&engine, text).unwrap_err(), Error::Request(_)));
        let mut misfit = ids_request(&PROMPT, 5);
        misfit.adapter = Some(adapter("bf16-4bit", "all-layers"));
        assert!(matches!(generate(&engine, misfit).unwrap_err(), Error::Adapter(_)));
        assert_eq!(good.wait().unwrap(), expected);
    });
}

#[test]
fn a_panic_ends_its_own_request_and_the_engine_serves_on() {
    on_every_device(|device| {
        let engine = load_with(device, Limits::default());
        let expected = generate(&engine, ids_request(&PROMPT, 40)).unwrap();
        let (sender, events) = std::sync::mpsc::channel();
        let sink = Sink::new(move |event| {
            let chunk = matches!(event, Event::Chunk { .. });
            sender.send(event).unwrap();
            assert!(!chunk, "a fault in whoever listens");
            true
        });
        let good = start(&engine, ids_request(&PROMPT, 40)).unwrap();
        let _faulty = engine.generate(ids_request(&PROMPT, 40), sink).unwrap();
        assert_eq!(good.wait().unwrap(), expected);
        assert!(matches!(events.iter().last(), Some(Event::Failed(Error::Panic(_)))));
        assert_eq!(generate(&engine, ids_request(&PROMPT, 40)).unwrap(), expected);
    });
}

#[test]
fn an_adapter_is_forgotten_when_it_is_dropped() {
    on_every_device(|device| {
        let engine = load_with(device, Limits::default());
        let adapters = metrics::ADAPTERS.load(Relaxed);
        for _ in 0..3 {
            let mut request = ids_request(&PROMPT, 2);
            request.adapter = Some(adapter(ENDLESS, "all-layers"));
            generate(&engine, request).unwrap();
        }
        soon(|| metrics::ADAPTERS.load(Relaxed) == adapters);
    });
}

#[test]
fn scores_do_not_depend_on_the_chunks() {
    on_every_device(|device| {
        let ids: Vec<u32> = (0..60).map(|place| (place * 37) % 256).collect();
        let whole = score(&load_with(device, Limits::default()), &ids, None).unwrap();
        let chunked = load_with(device, Limits { prefill_chunk: 7, ..Limits::default() });
        let chunked = score(&chunked, &ids, None).unwrap();
        assert_eq!(whole.len(), 59);
        for (one, other) in whole.iter().zip(&chunked) {
            assert!((one - other).abs() < 1e-4, "{one} {other}");
        }
    });
}

#[test]
fn a_request_is_cancelled_in_prefill_and_in_the_queue() {
    on_every_device(|device| {
        let limits = Limits { prefill_chunk: 1, max_batch_size: 1, ..Limits::default() };
        let engine = load_with(device, limits);
        let request = || ids_request(&[7; 400], 100);
        let prefills = start(&engine, request()).unwrap();
        let queued = start(&engine, request()).unwrap();
        soon(|| metrics::SEQUENCES.load(Relaxed) == 2);
        for running in [queued, prefills] {
            running.generation.cancel();
            let events: Vec<_> = running.events.iter().collect();
            assert_eq!(events.len(), 1);
            assert!(was_cancelled(&events[0], 400), "{events:?}");
        }
        assert!(all_free());
    });
}

#[test]
fn scores_leave_room_for_requests_and_end_with_their_handles() {
    on_every_device(|device| {
        let engine = load_with(device, Limits { prefill_chunk: 1, ..Limits::default() });
        let ids: Vec<u32> = (0..500).map(|place| (place * 37) % 256).collect();
        let scores: Vec<_> = (0..3).map(|_| start_score(&engine, &ids, None).unwrap()).collect();
        generate(&engine, ids_request(&PROMPT, 3)).unwrap();
        assert!(scores[2].events.try_recv().is_err(), "the request waited for all scores");
        for Running { generation, events } in scores {
            drop(generation);
            assert_eq!(events.iter().count(), 1);
        }
        soon(all_free);
    });
}

#[test]
fn numbers_that_are_none_are_an_error() {
    on_every_device(|device| {
        let engine = load_with(device, Limits::default());
        let folder = parity(ENDLESS).join("adapters/all-layers");
        let huge = Arc::new(bombus::model::adapter::Adapter::open(&folder, Some(1e38)).unwrap());
        let scored = score(&engine, &PROMPT, Some(huge.clone())).unwrap_err();
        assert!(scored.to_string().contains("not a finite number"), "{scored}");
        let mut request = ids_request(&PROMPT, 5);
        request.adapter = Some(huge);
        assert!(matches!(generate(&engine, request), Err(Error::Backend(_))));
        assert_eq!(generate(&engine, ids_request(&PROMPT, 5)).unwrap().ids.len(), 5);
    });
}

#[cfg(target_os = "linux")]
#[test]
fn a_model_that_goes_takes_its_threads_along() {
    on_every_device(|device| {
        let threads = || threads_named("bombus-engine");
        let load = || {
            drop(generate(&load_with(device, Limits::default()), ids_request(&PROMPT, 2)).unwrap())
        };
        load();
        soon(|| metrics::MODELS.load(Relaxed) == 0);
        let before = threads();
        (0..10).for_each(|_| load());
        // The next engine may start a moment before the last one's thread is free, so a few more are
        // no leak; two for every model would be.
        soon(|| threads() < before + 10);
    });
}

/// Two streams would wait for each other in every layer, and nothing would wait for the second one's end.
#[cfg(all(feature = "mlx", target_os = "linux"))]
#[test]
fn a_model_works_in_one_of_mlxs_streams() {
    use bombus::backend::mlx::{Device, Mlx};
    use bombus::backend::{Backend, Batch, Token};
    use bombus::config::Config;
    use bombus::model::executor::Executor;
    use bombus::{model::weights, sampler::Draw};
    const NAME: &str = "one-stream";
    let work = || {
        let backend = Mlx::new(Device::Cpu).unwrap();
        backend.clone().scope(|| {
            // MLX has a thread for each stream of its CPU device, and where there is a card one for that.
            mlx_rs::transforms::eval([&mlx_rs::Array::ones::<f32>(&[1]).unwrap()]).unwrap();
            let before = threads_named(NAME);
            let folder = parity("f32-untied");
            let config = Config::open(&folder).unwrap();
            let decoder = weights::load(&folder, &config, None, backend).unwrap();
            let mut caches = [decoder.cache(), decoder.cache()];
            let tokens: Vec<Token> = (0..5).map(Token::Id).collect();
            let mut batch = Batch::default();
            for (cache, rows) in caches.iter_mut().zip([0..3, 3..5]) {
                batch.push(&tokens[rows.clone()], 0, &[rows.len() - 1], cache, None);
            }
            let logits = decoder.forward(&mut batch, None).unwrap();
            let samples = decoder.backend.sample(&logits, &[Draw::default(), Draw::default()]);
            decoder.backend.read(&samples.unwrap()).unwrap();
            (before, threads_named(NAME))
        })
    };
    let thread = std::thread::Builder::new().name(NAME.into()).spawn(work).unwrap();
    let (before, after) = thread.join().unwrap();
    assert!(before > 1, "a stream has a thread");
    assert_eq!(before, after, "there is one stream");
}

#[test]
fn the_shipped_model_speaks() {
    on_every_device(|device| {
        let folder = repository().join("priv/models/demo");
        let engine = Engine::load(&folder, device, Limits::default()).unwrap();
        let mut request = ids_request(&[], 100);
        request.tokenizer = Some(Arc::new(Tokenizer::open(&folder).unwrap()));
        let messages = r#"[{"role": "user", "content": "Write a post about coffee"}]"#.into();
        request.prompt = Prompt::Chat { messages, options: "{}".into() };
        let answer = generate(&engine, request).unwrap();
        println!("{}", answer.text);
        assert_eq!(answer.reason, FinishReason::Stop);
        assert!(
            answer.text.to_lowercase().contains("coffee") && answer.text.ends_with(['.', '?', '!'])
        );
    });
}

#[test]
fn a_load_that_nobody_waits_for_ends() {
    let _alone = alone();
    let cpu = Device::Cpu(Default::default());
    let layout = Some(Quantization { group_size: 32, bits: 4 });
    let load = |layout| Engine::load_quantized(&parity(ENDLESS), layout, cpu, Limits::default());
    let abandoned = Abandoned::default();
    assert!(abandoned.scope(|| load(layout)).is_ok());
    abandoned.set();
    for layout in [None, layout] {
        assert!(matches!(abandoned.scope(|| load(layout)), Err(Error::Stopped)));
    }
    assert!(load(layout).is_ok());
    soon(|| metrics::MODELS.load(Relaxed) == 0);
}

/// In place of the file: shorter, longer, or with other bytes.
#[test]
fn a_file_that_changes_under_a_model_is_an_error_and_not_the_end() {
    let _alone = alone();
    let cpu = Device::Cpu(Default::default());
    for change in [
        |file: &std::fs::File| file.set_len(4096),
        |file: &std::fs::File| file.set_len(1 << 24),
        |file: &std::fs::File| file.set_modified(std::time::SystemTime::UNIX_EPOCH),
    ] {
        let folder = tempfile::tempdir().unwrap();
        for name in ["config.json", "model.safetensors"] {
            std::fs::copy(parity(ENDLESS).join(name), folder.path().join(name)).unwrap();
        }
        let engine = Engine::load(folder.path(), cpu, Limits::default()).unwrap();
        let weights = folder.path().join("model.safetensors");
        change(&std::fs::File::options().write(true).open(weights).unwrap()).unwrap();
        let error = generate(&engine, ids_request(&PROMPT, 5)).unwrap_err();
        assert!(matches!(&error, Error::Io(what) if what.contains("changed")), "{error:?}");
        assert!(matches!(score(&engine, &PROMPT, None), Err(Error::Io(_))));
    }
    let engine = load_with(cpu, Limits::default());
    assert_eq!(generate(&engine, ids_request(&PROMPT, 5)).unwrap().ids.len(), 5);
}

#[test]
fn models_side_by_side_answer_as_alone() {
    let _alone = alone();
    let engines: Vec<Engine> = (1..=3)
        .map(|threads| {
            let options = Options { threads, ..Options::default() };
            load_with(Device::Cpu(options), Limits::default())
        })
        .collect();
    let request = || ids_request(&PROMPT, 60);
    let expected = generate(&engines[0], request()).unwrap();
    for _ in 0..3 {
        let running: Vec<_> = engines.iter().map(|e| start(e, request()).unwrap()).collect();
        running.into_iter().for_each(|running| assert_eq!(running.wait().unwrap(), expected));
    }
}
