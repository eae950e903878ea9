//! Requests that wait: for their time to run out, for a slow reader, for the end of their model.
//!
//! The gauges are the process's, so these tests run one after another.

#![allow(clippy::unwrap_used)]

mod common;

use bombus::engine::scheduler::Limits;
use bombus::engine::sequence::FinishReason;
use bombus::engine::{Engine, Event, Prompt, Request, Sink};
use bombus::error::{Error, Result};
use bombus::runtime::metrics::{ADAPTERS, KV_BYTES, MODELS, SEQUENCES};
use bombus::tokenizer::Tokenizer;
use common::*;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

const PROMPT: [u32; 5] = [3, 1, 4, 1, 5];
/// Longer than any test.
const LONG: Duration = Duration::from_secs(1000);

fn all_free() -> bool {
    SEQUENCES.load(Relaxed) == 0 && KV_BYTES.load(Relaxed) == 0
}

#[track_caller]
fn soon(what: impl Fn() -> bool) {
    let start = Instant::now();
    while !what() {
        assert!(start.elapsed() < Duration::from_secs(20), "it did not happen");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn within(timeout: Duration, tokens: usize) -> Request {
    Request { timeout: Some(timeout), ..ids_request(&PROMPT, tokens) }
}

/// Its reader acknowledges nothing by itself.
fn start_with_window(engine: &Engine, request: Request, window: usize) -> Running {
    let (sender, events) = channel();
    let sink = Sink::new(move |event| sender.send(event).is_ok()).with_window(Some(window));
    Running { generation: engine.generate(request, sink).unwrap(), events }
}

fn timed_out(running: Running) -> bool {
    let ends = running.events.iter().filter(|event| !matches!(event, Event::Chunk(_)));
    ends.collect::<Vec<_>>() == [Event::Failed(Error::Timeout)]
}

#[test]
fn a_request_that_takes_too_long_ends_wherever_it_is() {
    on_every_device(|device| {
        let limits = Limits { max_batch_size: 1, prefill_chunk: 1, ..Limits::default() };
        let engine = load_with(device, limits);
        // One has time, and runs; of the others one prefills and one waits in the queue. 500 steps
        // take at least ten times as long as they have.
        let fine = start(&engine, within(LONG, 3)).unwrap();
        let soon_over = Duration::from_millis(3);
        let mut prefills = ids_request(&[7; 500], 1);
        prefills.timeout = Some(soon_over);
        let [first, second] = [prefills, within(soon_over, 500)];
        let first = start(&engine, first).unwrap();
        let second = start(&engine, second).unwrap();
        assert!(timed_out(first) && timed_out(second));
        assert_eq!(fine.wait().unwrap().ids.len(), 3);
        // One that decodes, and one for which there is no time at all.
        let decodes = start(&engine, within(soon_over, 500)).unwrap();
        assert!(timed_out(start(&engine, within(Duration::ZERO, 5)).unwrap()));
        assert!(timed_out(decodes) || generate(&engine, ids_request(&PROMPT, 500)).is_ok());
        assert!(all_free());
        assert_eq!(generate(&engine, within(LONG, 4)).unwrap().ids.len(), 4);
    });
}

#[test]
fn a_score_that_takes_too_long_ends() {
    on_every_device(|device| {
        let engine = load_with(device, Limits { prefill_chunk: 1, ..Limits::default() });
        let ids: Vec<u32> = (0..500).map(|place| (place * 37) % 256).collect();
        let score = |timeout| {
            let (sender, events) = channel();
            let sink = Sink::new(move |event| sender.send(event).is_ok());
            let _generation = engine.score(ids.clone(), None, Some(timeout), sink).unwrap();
            events.iter().last().unwrap()
        };
        assert_eq!(score(Duration::from_millis(5)), Event::Failed(Error::Timeout));
        assert!(matches!(score(LONG), Event::Scores(scores) if scores.len() == 499));
        assert!(all_free());
    });
}

#[test]
fn a_text_that_is_not_tokens_yet_ends_in_time() {
    on_every_device(|device| {
        let folder = repository().join("priv/models/demo");
        let engine = Engine::load(&folder, device, Limits::default()).unwrap();
        let tokenizer = Arc::new(Tokenizer::open(&folder).unwrap());
        let request = |text: &str, timeout| Request {
            tokenizer: Some(tokenizer.clone()),
            timeout: Some(timeout),
            ..Request::new(Prompt::Text(text.into()), 1)
        };
        // They keep whoever makes tokens busy for far longer than the last of them has.
        let text = "Tea and ".repeat(1000);
        let busy: Vec<_> = (0..50).map(|_| start(&engine, request(&text, LONG)).unwrap()).collect();
        let begun = Instant::now();
        let waits = start(&engine, request("hi", Duration::from_millis(1))).unwrap();
        assert!(timed_out(waits));
        let waited = begun.elapsed();
        busy.into_iter().for_each(|running| drop(running.wait()));
        assert!(waited < begun.elapsed());
        soon(all_free);
    });
}

#[test]
fn a_slow_reader_loses_nothing_and_holds_nobody_up() {
    on_every_device(|device| {
        let limits = Limits { max_batch_size: 1, prefix_cache: 0, ..Limits::default() };
        let engine = load_with(device, limits);
        let request = || {
            let mut request = ids_request(&PROMPT, 200);
            request.sampling.logprobs = Some(1);
            request
        };
        let (expected, _, logprobs) = start(&engine, request()).unwrap().wait_for_all().unwrap();
        // More of them than may run: their caches are given up, and computed again.
        let slow: Vec<Running> = (0..4).map(|_| start_with_window(&engine, request(), 8)).collect();
        // Nobody reads: with 8 chunks unread and as much joined behind them each waits.
        let unread = |running: &Running| running.events.try_iter().count();
        let mut lying = vec![0; slow.len()];
        let begun = Instant::now();
        while lying.iter().sum::<usize>() < 4 * 8 && begun.elapsed() < Duration::from_secs(20) {
            slow.iter().zip(&mut lying).for_each(|(running, lying)| *lying += unread(running));
        }
        assert_eq!(lying, [8; 4]);
        // Others run meanwhile.
        assert_eq!(generate(&engine, ids_request(&PROMPT, 50)).unwrap().ids.len(), 50);
        assert!(slow.iter().all(|running| unread(running) == 0));
        drop(slow);
        soon(all_free);

        // A reader that reads on gets what others get.
        let running = start_with_window(&engine, request(), 8);
        let other = start_with_window(&engine, request(), 3);
        for Running { generation, events } in [running, other] {
            let (mut ids, mut got, mut ended) = (vec![], vec![], false);
            for event in events.iter() {
                match event {
                    Event::Chunk(chunk) => {
                        assert_eq!(chunk.ids.len(), chunk.logprobs.len());
                        ids.extend(chunk.ids);
                        got.extend(chunk.logprobs);
                        // Slower than the model.
                        std::thread::sleep(Duration::from_micros(300));
                        generation.acknowledge(1);
                    }
                    event => {
                        ended = true;
                        let Event::Done { reason, .. } = event else { panic!("{event:?}") };
                        assert_eq!(reason, FinishReason::Length);
                    }
                }
            }
            assert!(ended);
            assert_eq!(ids, expected.ids);
            for (one, other) in got.iter().zip(&logprobs) {
                assert!((one.chosen - other.chosen).abs() < 1e-3);
            }
        }
        assert!(all_free());
    });
}

#[test]
fn a_paused_request_is_cancelled_and_runs_out_of_time_like_others() {
    on_every_device(|device| {
        let engine = load_with(device, Limits { max_batch_size: 1, ..Limits::default() });
        let paused = start_with_window(&engine, ids_request(&PROMPT, 400), 1);
        assert!(matches!(paused.events.recv().unwrap(), Event::Chunk(_)));
        paused.generation.cancel();
        let ends: Vec<Event> = paused.events.iter().collect();
        assert!(matches!(ends.last(), Some(Event::Done { reason: FinishReason::Cancelled, .. })));
        let paused = start_with_window(&engine, within(Duration::from_millis(50), 500), 1);
        assert!(timed_out(paused));
        assert!(all_free());
    });
}

/// -> whether it is done
fn unload(engine: &Engine, cancel: bool) -> std::sync::mpsc::Receiver<usize> {
    let (sender, done) = channel();
    engine.unload(cancel, move || _ = sender.send(MODELS.load(Relaxed)));
    done
}

#[test]
fn an_unloaded_model_ends_its_requests_and_is_gone() {
    on_every_device(|device| {
        soon(|| MODELS.load(Relaxed) == 0);
        for cancel in [false, true] {
            let engine = load_with(device, Limits { max_batch_size: 1, ..Limits::default() });
            let running: Vec<Running> =
                (0..3).map(|_| start(&engine, ids_request(&PROMPT, 300)).unwrap()).collect();
            let done = unload(&engine, cancel);
            let refused = |result: Result<Running>| matches!(result, Err(Error::Unloaded(_)));
            assert!(refused(start(&engine, ids_request(&PROMPT, 3))));
            assert!(refused(start_score(&engine, &PROMPT, None)));
            assert!(matches!(engine.save(&repository(), false), Err(Error::Unloaded(_))));
            // Whoever hears of the end finds the model gone, though its handles are held.
            assert_eq!(done.recv(), Ok(0));
            for running in &running {
                let reason = match running.events.iter().last() {
                    Some(Event::Done { reason, .. }) => reason,
                    other => panic!("{other:?}"),
                };
                let right = if cancel { FinishReason::Cancelled } else { FinishReason::Length };
                assert_eq!(reason, right);
            }
            assert!(all_free());
            // Once more is as well.
            assert_eq!(unload(&engine, cancel).recv(), Ok(0));
            drop(running);
        }
    });
}

#[test]
fn an_adapter_is_bound_beside_others_and_goes_with_its_last_request() {
    on_every_device(|device| {
        let engine = load_with(device, Limits::default());
        let stream = start(&engine, ids_request(&PROMPT, 300)).unwrap();
        let one = adapter(ENDLESS, "all-layers");
        let adapters = ADAPTERS.load(Relaxed);
        let (sender, gone) = channel();
        one.on_drop(move || _ = sender.send(ADAPTERS.load(Relaxed)));
        let request = |adapter: &Arc<bombus::model::adapter::Adapter>| Request {
            adapter: Some(adapter.clone()),
            ..ids_request(&PROMPT, 20)
        };
        // Some wait for it together; one of them leaves before it is bound.
        let together: Vec<Running> =
            (0..4).map(|_| start(&engine, request(&one)).unwrap()).collect();
        let leaves = start(&engine, request(&one)).unwrap();
        leaves.generation.cancel();
        let answers: Vec<_> = together.into_iter().map(|it| it.wait().unwrap().ids).collect();
        assert!(answers.iter().all(|answer| *answer == answers[0]));
        assert_ne!(answers[0], generate(&engine, ids_request(&PROMPT, 20)).unwrap().ids);
        drop(one);
        assert_eq!(gone.recv(), Ok(adapters - 1));
        assert_eq!(stream.wait().unwrap().ids.len(), 300);
    });
}

#[test]
fn requests_with_an_adapter_are_cancelled_with_it() {
    on_every_device(|device| {
        let engine = load_with(device, Limits { max_batch_size: 3, ..Limits::default() });
        let [one, other] = ["all-layers", "last-qv"].map(|name| adapter(ENDLESS, name));
        let (sender, gone) = channel();
        one.on_drop(move || _ = sender.send(()));
        let request = |adapter: &Arc<bombus::model::adapter::Adapter>, tokens| Request {
            adapter: Some(adapter.clone()),
            ..ids_request(&PROMPT, tokens)
        };
        let kept = start(&engine, request(&other, 100)).unwrap();
        // Some run, some wait; one comes afterwards.
        let mut ended: Vec<Running> =
            (0..4).map(|_| start(&engine, request(&one, 500)).unwrap()).collect();
        ended[0].events.recv().unwrap();
        one.cancel();
        ended.push(start(&engine, request(&one, 500)).unwrap());
        drop(one);
        assert_eq!(gone.recv(), Ok(()));
        for running in ended {
            assert_eq!(running.wait().unwrap().reason, FinishReason::Cancelled);
        }
        assert_eq!(kept.wait().unwrap().ids.len(), 100);
    });
}
