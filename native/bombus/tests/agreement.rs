//! The CPU backend on the shipped model, along the greedy texts that mlx-lm 0.32.2 writes to 100
//! prompts (`scripts/make_agreement.py`).
//!
//! On a CPU mlx-lm adds up in bfloat16, and so takes another token than exact arithmetic at 2 in
//! 100 of the positions at which its two best logits are more than 0.1 apart. The CPU backend is
//! to be exact: it takes the token of float32 there, and so mlx-lm's as often as float32 does.

#![allow(clippy::unwrap_used)]

mod common;

use bombus::backend::cpu::{Cpu, Level, Options};
use bombus::backend::{Backend, Segment, Token};
use bombus::checkpoint;
use bombus::config::Config;
use bombus::decoder::{Decoder, Part};
use bombus::sampler::Draw;
use common::repository;

#[derive(serde::Deserialize)]
struct Text {
    /// how many of the ids are the prompt's
    prompt: usize,
    ids: Vec<u32>,
    /// of each id behind the prompt
    gaps: Vec<f32>,
    /// what float32 takes in place of each of those
    exact: Vec<u32>,
}

/// The most probable token after each of the ids.
fn next_tokens(decoder: &Decoder<Cpu>, ids: &[u32]) -> Vec<Option<u32>> {
    let tokens: Vec<Token> = ids.iter().map(|&id| Token::Id(id)).collect();
    let segment = Segment { rows: 0..ids.len(), start: 0 };
    let outputs: Vec<usize> = (0..ids.len()).collect();
    let part = Part { segment, cache: &mut decoder.kv_cache(), adapter: None };
    let logits = decoder.forward(&tokens, None, &mut [part], &outputs).unwrap();
    let greedy = vec![Draw::default(); ids.len()];
    let samples = decoder.backend.sample(&logits, &greedy).unwrap();
    decoder.backend.read(&samples).unwrap()
}

#[test]
fn the_next_token_is_the_exact_one() {
    let fixture = std::fs::read(repository().join("test/fixtures/agreement.json")).unwrap();
    let texts: Vec<Text> = serde_json::from_slice(&fixture).unwrap();
    assert_eq!(texts.len(), 100);
    let folder = repository().join("priv/models/demo");
    let config = Config::open(&folder).unwrap();
    for level in Level::all() {
        let cpu = Cpu::new(Options { level, ..Options::default() }).unwrap();
        let decoder = checkpoint::load(&folder, &config, cpu).unwrap();
        let (mut clear, mut same, mut exacts, mut exact_same) = (0, 0, 0, 0);
        for Text { prompt, ids, gaps, exact } in &texts {
            let next = next_tokens(&decoder, &ids[..ids.len() - 1]);
            for (place, _) in gaps.iter().enumerate().filter(|(_, gap)| **gap > 0.1) {
                let (ours, mlx_lms) = (next[prompt + place - 1].unwrap(), ids[prompt + place]);
                clear += 1;
                same += usize::from(ours == mlx_lms);
                exact_same += usize::from(exact[place] == mlx_lms);
                exacts += usize::from(ours == exact[place]);
            }
        }
        println!("{level:?}: of {clear} {exacts} exact, {same} mlx-lm's ({exact_same} in float32)");
        assert!(clear > 3000 && exacts * 1000 >= clear * 999, "{level:?}: {exacts} of {clear}");
        assert!(same * 1000 >= clear * 975, "{level:?}: {same} of {clear}");
    }
}
