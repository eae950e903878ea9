//! A process that may have no more memory. Alone in its program: the limit is the process's.

#![allow(clippy::unwrap_used)]
#![cfg(target_os = "linux")]

mod common;

use bombus::engine::{Device, Engine};
use bombus::error::Error;
use bombus::gauge::{KV_BYTES, SEQUENCES};
use bombus::scheduler::Limits;
use common::*;
use std::sync::atomic::Ordering::Relaxed;

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

#[test]
fn a_prompt_that_has_no_memory_fails_alone() {
    // A model that would take a very long prompt.
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
    let limits = Limits { prefill_chunk: 16, ..Limits::default() };
    let engine = Engine::load(folder.path(), Device::Cpu(Default::default()), limits).unwrap();
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
