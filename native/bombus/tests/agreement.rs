//! The CPU backend on the shipped model, along the greedy texts that mlx-lm 0.32.2 writes to 100
//! prompts (`scripts/make_agreement.py`).
//!
//! On a GPU (an H200 wrote these) mlx-lm adds up in float32: where its two best logits are more
//! than 0.1 apart, the CPU backend is to take its token. On a CPU mlx-lm adds up in bfloat16, and
//! takes another token than float32 at 2 in 100 of those positions: there the CPU backend is to
//! take float32's, and so mlx-lm's as often as float32 does.

#![allow(clippy::unwrap_used)]

mod common;

use bombus::backend::cpu::{Cpu, Level, Options};
use bombus::backend::{Backend, Batch, Token};
use bombus::config::Config;
use bombus::model::decoder::Decoder;
use bombus::model::executor::Executor;
use bombus::model::weights;
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
    let outputs: Vec<usize> = (0..ids.len()).collect();
    let (mut cache, mut batch) = (decoder.cache(), Batch::default());
    batch.push(&tokens, 0, &outputs, &mut cache, None);
    let logits = decoder.forward(&mut batch, None).unwrap();
    let greedy = vec![Draw::default(); ids.len()];
    let samples = decoder.backend.sample(&logits, &greedy).unwrap();
    let samples = decoder.backend.read(&samples).unwrap();
    samples.into_iter().map(|sample| sample.map(|sample| sample.id)).collect()
}

#[test]
fn the_next_token_is_that_of_mlx_on_a_gpu() {
    for (level, Count { clear, same, exact, .. }) in count("agreement_gpu.json", Level::all()) {
        assert!(same * 100 >= clear * 99, "{level:?}: {same} of {clear}");
        assert!(exact * 1000 >= clear * 999, "{level:?}: {exact} of {clear} as float32");
    }
}

#[test]
fn the_next_token_is_float32s_where_mlx_adds_up_in_bfloat16() {
    for (level, Count { clear, same, exact, float32 }) in
        count("agreement_cpu.json", vec![Level::detect()])
    {
        assert!(exact * 1000 >= clear * 999, "{level:?}: {exact} of {clear} as float32");
        assert!(same * 1000 >= float32 * 999, "{level:?}: {same}, float32 {float32}");
    }
}

/// Positions at which mlx-lm's choice is clear.
#[derive(Debug, Default)]
struct Count {
    clear: usize,
    /// where we take mlx-lm's token
    same: usize,
    /// where we take float32's
    exact: usize,
    /// where float32 takes mlx-lm's
    float32: usize,
}

fn count(fixture: &str, levels: Vec<Level>) -> Vec<(Level, Count)> {
    let fixture = repository().join("test/fixtures").join(fixture);
    let texts: Vec<Text> = serde_json::from_slice(&std::fs::read(fixture).unwrap()).unwrap();
    assert_eq!(texts.len(), 100);
    let folder = repository().join("priv/models/demo");
    let config = Config::open(&folder).unwrap();
    let all = levels.into_iter().map(|level| {
        let cpu = Cpu::new(Options { level, ..Options::default() }).unwrap();
        let decoder = weights::load(&folder, &config, None, cpu).unwrap();
        let mut count = Count::default();
        for Text { prompt, ids, gaps, exact } in &texts {
            let next = next_tokens(&decoder, &ids[..ids.len() - 1]);
            for (place, _) in gaps.iter().enumerate().filter(|(_, gap)| **gap > 0.1) {
                let (ours, mlx_lms) = (next[prompt + place - 1].unwrap(), ids[prompt + place]);
                count.clear += 1;
                count.same += usize::from(ours == mlx_lms);
                count.exact += usize::from(ours == exact[place]);
                count.float32 += usize::from(exact[place] == mlx_lms);
            }
        }
        println!("{level:?}: {count:?}");
        assert!(count.clear > 3000);
        (level, count)
    });
    all.collect()
}
