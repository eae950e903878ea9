//! A process that may have no more memory. Alone in its program, one test after another: the limit is
//! the process's.

#![allow(clippy::unwrap_used)]
#![cfg(target_os = "linux")]

mod common;

use bombus::backend::Device;
use bombus::engine::scheduler::Limits;
use bombus::engine::{Engine, Step};
use bombus::error::Error;
use bombus::runtime::memory;
use bombus::runtime::metrics::{KV_BYTES, PREFIX_BYTES, SEQUENCES};
use common::*;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::channel;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Bytes of address space, of which there is no limit where it is `RLIM_INFINITY`.
#[allow(unsafe_code)]
fn limit(bytes: libc::rlim_t) {
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the structure is whole, and lives until the call is over.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &limit) }, 0);
}

fn in_use() -> libc::rlim_t {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').next().unwrap().parse::<libc::rlim_t>().unwrap() * 4096
}

fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A model that would take a very long prompt.
fn load(limits: Limits) -> Engine {
    let folder = tempfile::tempdir().unwrap();
    let from = parity("f32-untied");
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(from.join(name), folder.path().join(name)).unwrap();
    }
    let path = folder.path().join("config.json");
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["max_position_embeddings"] = 100_000_000.into();
    std::fs::write(&path, config.to_string()).unwrap();
    // The weights stay mapped.
    Engine::load(folder.path(), Device::Cpu(Default::default()), limits).unwrap()
}

#[test]
fn a_prompt_that_has_no_memory_fails_alone() {
    let _alone = alone();
    let engine = load(Limits { prefill_chunk: 16, ..Limits::default() });
    let expected = generate(&engine, ids_request(&[3, 1, 4, 1, 5], 20)).unwrap();
    let stream = start(&engine, ids_request(&[3, 1, 4, 1, 5], 400)).unwrap();

    let long = ids_request(&vec![7; 4_000_000], 1);
    limit(in_use() + (256 << 20));
    let error = generate(&engine, long).unwrap_err();
    limit(libc::RLIM_INFINITY);

    assert!(matches!(error, Error::OutOfMemory(_)), "{error:?}");
    assert_eq!(stream.wait().unwrap().ids[..20], expected.ids);
    assert_eq!(generate(&engine, ids_request(&[3, 1, 4, 1, 5], 20)).unwrap(), expected);
    assert_eq!(SEQUENCES.load(Relaxed) + KV_BYTES.load(Relaxed), 0);
}

/// What a page of all layers takes, which 25 tokens have one of.
fn page(engine: &Engine) -> usize {
    let (sender, steps) = channel::<Step>();
    engine.watch(Box::new(move |step| sender.send(step).is_ok()));
    generate(engine, ids_request(&[3, 1, 4, 1, 5], 20)).unwrap();
    steps.try_iter().map(|step| step.kv_bytes).max().unwrap()
}

/// What `memory` keeps free, and so many bytes.
fn pretend(bytes: usize) {
    memory::pretend(Some((128 << 20) + bytes as u64));
}

#[test]
fn generated_tokens_that_have_no_memory_end_their_own_request() {
    let _alone = alone();
    for prefix_cache in [0, 1 << 20] {
        let engine = load(Limits { prefix_cache, ..Limits::default() });
        let page = page(&engine);
        let short = || ids_request(&[3, 1, 4, 1, 5], 100);
        let expected = generate(&engine, short()).unwrap();
        // What is kept for others is given up first.
        generate(&engine, ids_request(&[9; 300], 1)).unwrap();
        let (sender, steps) = channel::<Step>();
        engine.watch(Box::new(move |step| sender.send(step).is_ok()));
        let before = KV_BYTES.load(Relaxed) + PREFIX_BYTES.load(Relaxed);
        pretend(6 * page);
        let long = start(&engine, ids_request(&[2, 7, 1, 8, 2, 8], 5000)).unwrap();
        let other = start(&engine, short()).unwrap();
        assert_eq!(other.wait().unwrap(), expected);
        let error = long.wait().unwrap_err();
        assert!(matches!(error, Error::OutOfMemory(_)), "{error:?}");
        // It serves on, within what there is.
        assert_eq!(generate(&engine, short()).unwrap(), expected);
        memory::pretend(None);
        drop(engine);
        let most = steps.iter().map(|step| step.kv_bytes + step.prefix_bytes).max().unwrap();
        assert!((3 * page..=6 * page + before).contains(&most), "{most} of {page}");
    }
    assert_eq!(SEQUENCES.load(Relaxed) + KV_BYTES.load(Relaxed), 0);
}

#[test]
fn a_score_that_has_no_memory_fails_alone() {
    let _alone = alone();
    let engine = load(Limits { prefix_cache: 0, ..Limits::default() });
    let page = page(&engine);
    let stream = start(&engine, ids_request(&[3, 1, 4, 1, 5], 40)).unwrap();
    pretend(4 * page);
    let error = score(&engine, &[7; 1000], None).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory(_)), "{error:?}");
    assert_eq!(score(&engine, &[7; 100], None).unwrap().len(), 99);
    memory::pretend(None);
    assert_eq!(stream.wait().unwrap().ids.len(), 40);
}
