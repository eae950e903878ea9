//! What sampling is, for whichever backend does it.

use crate::sampler::{Draw, Logprobs, Sample as Drawn, Sampling};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use std::sync::Arc;

/// Rows of logits and their draws -> one token each, none where a row holds NaN.
pub type Sample<'a> = &'a dyn Fn(&[Vec<f32>], &[Draw]) -> Vec<Option<Drawn>>;

pub fn run(sample: Sample) {
    greedy_takes_the_highest_even_beside_sampled_rows(sample);
    a_repetition_penalty_falls_on_seen_tokens(sample);
    tokens_come_as_often_as_their_probability(sample);
    logits_that_are_no_numbers_are_found(sample);
    extreme_temperatures_and_logits_stay_finite(sample);
    what_is_drawn_passes_the_filters(sample);
    a_bias_moves_logits_and_bans_tokens(sample);
    logprobs_are_the_models_own(sample);
}

fn sample_rows(sample: Sample, rows: &[Vec<f32>], draws: &[Draw]) -> Vec<u32> {
    sample(rows, draws).into_iter().map(|drawn| drawn.unwrap().id).collect()
}

/// The definition, for one row: filters on the sorted distribution, then its inverse.
fn reference(logits: &[f32], draw: &Draw) -> Vec<usize> {
    let sampling = &draw.sampling;
    let penalized = |(id, &logit): (usize, &f32)| match draw.seen.contains(&(id as u32)) {
        true if logit > 0.0 => logit / sampling.repetition_penalty,
        true => logit * sampling.repetition_penalty,
        false => logit,
    };
    let logits: Vec<f64> = logits.iter().enumerate().map(penalized).map(f64::from).collect();
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    if sampling.greedy() {
        return vec![order[0]];
    }
    let temperature = f64::from(sampling.temperature);
    let highest = logits[order[0]];
    let weight = |id: &usize| ((logits[*id] - highest) / temperature).exp();
    if sampling.top_k > 0 {
        order.truncate(sampling.top_k);
    }
    let total: f64 = order.iter().map(weight).sum();
    let mut before = 0.0;
    order.retain(|id| {
        // The first has nothing before it.
        let keep = before < f64::from(sampling.top_p) * total || before == 0.0;
        before += weight(id);
        keep
    });
    order.retain(|id| weight(id) >= f64::from(sampling.min_p));
    order
}

fn draw(sampling: Sampling, uniform: f32, seen: &[u32]) -> Draw {
    Draw { sampling: sampling.into(), uniform, seen: Arc::new(seen.to_vec()), ..Draw::default() }
}

fn biased(draw: &Draw, logit_bias: Vec<(u32, f32)>) -> Draw {
    let sampling = Sampling { logit_bias, ..(*draw.sampling).clone() };
    Draw { sampling: sampling.into(), ..draw.clone() }
}

const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, -1.0, 2.5];

fn greedy_takes_the_highest_even_beside_sampled_rows(sample: Sample) {
    let hot = Sampling { temperature: 5.0, ..Sampling::default() };
    let draws = [draw(Sampling::default(), 0.99, &[]), draw(hot, 0.9999, &[])];
    assert_eq!(sample_rows(sample, &[LOGITS.to_vec(), LOGITS.to_vec()], &draws), [1, 4]);
}

fn a_repetition_penalty_falls_on_seen_tokens(sample: Sample) {
    let sampling = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
    assert_eq!(sample_rows(sample, &[LOGITS.to_vec()], &[draw(sampling, 0.5, &[1, 4])]), [2]);
}

fn tokens_come_as_often_as_their_probability(sample: Sample) {
    let sampling = Sampling { temperature: 0.7, ..Sampling::default() };
    let count = 2000;
    let draws: Vec<Draw> = (0..count)
        .map(|index| draw(sampling.clone(), (index as f32 + 0.5) / count as f32, &[]))
        .collect();
    let ids = sample_rows(sample, &vec![LOGITS.to_vec(); count], &draws);
    let weights = LOGITS.map(|logit| (f64::from(logit) / 0.7).exp());
    for (id, weight) in weights.iter().enumerate() {
        let frequency = ids.iter().filter(|&&drawn| drawn as usize == id).count() as f64;
        let expected = weight / weights.iter().sum::<f64>();
        assert!((frequency / count as f64 - expected).abs() < 2e-3, "{id}");
    }
}

fn logits_that_are_no_numbers_are_found(sample: Sample) {
    let rows = [vec![1.0, f32::NAN, 3.0], vec![1.0, f32::NEG_INFINITY, 3.0]];
    let draws = [draw(Sampling::default(), 0.5, &[]), draw(Sampling::default(), 0.5, &[])];
    assert_eq!(sample(&rows, &draws), [None, Some(Drawn { id: 2, logprobs: None })]);
}

fn extreme_temperatures_and_logits_stay_finite(sample: Sample) {
    let cold = Sampling { temperature: 1e-6, ..Sampling::default() };
    let logits = vec![1e4, -1e4, f32::MIN, 9.999e3, 0.0];
    assert_eq!(sample_rows(sample, &[logits], &[draw(cold, 0.999, &[])]), [0]);
}

fn what_is_drawn_passes_the_filters(sample: Sample) {
    let options = (
        prop::collection::vec(-5.0f32..5.0, 8..40),
        prop_oneof![Just(0.0f32), 0.3f32..3.0],
        0usize..8,
        0.05f32..1.0,
        0.0f32..0.9,
        0.0f32..0.99999,
    );
    let test =
        |(logits, temperature, top_k, top_p, min_p, uniform): (Vec<f32>, _, _, f32, f32, _)| {
            let sampling = Sampling { temperature, top_k, top_p, min_p, ..Sampling::default() };
            let draw = draw(sampling, uniform, &[]);
            // A token at the very edge of a filter may fall on either side of it.
            let wider = |by: f32| {
                let mut wide = Sampling::clone(&draw.sampling);
                wide.top_p = (top_p * (1.0 + by)).min(1.0);
                wide.min_p = min_p * (1.0 - by);
                reference(&logits, &Draw { sampling: wide.into(), ..draw.clone() })
            };
            let id =
                sample_rows(sample, std::slice::from_ref(&logits), std::slice::from_ref(&draw))[0];
            prop_assert!(wider(1e-4).contains(&(id as usize)), "{id} of {:?}", wider(0.0));
            Ok(())
        };
    TestRunner::deterministic().run(&options, test).unwrap();
}

fn a_bias_moves_logits_and_bans_tokens(sample: Sample) {
    let plain = draw(Sampling::default(), 0.5, &[]);
    let raised = biased(&plain, vec![(3, 4.0), (4, 0.25), (3, 0.5)]);
    // After the repetition penalty, which makes the two highest 1.5 and 1.25.
    let penalty = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
    let both = biased(&draw(penalty, 0.5, &[1, 4]), vec![(4, 2.0)]);
    let hot = Sampling { temperature: 100.0, ..Sampling::default() };
    let banned = Draw { withheld: vec![1, 4], ..draw(hot, 0.9999, &[]) };
    // Twice generated at 2 each, and once.
    let frequency = Sampling { frequency_penalty: 2.0, ..Sampling::default() };
    let counts = Arc::new(vec![(1, 2.0), (4, 1.0)]);
    let repeated = Draw { counts, ..draw(frequency, 0.5, &[]) };
    // A number of a file or a request never reaches beyond the row.
    let beyond = Draw { withheld: vec![1_000_000], ..draw(Sampling::default(), 0.5, &[7_000_000]) };
    let beyond = biased(&beyond, vec![(u32::MAX, 1.0)]);
    let draws = [plain, raised, both, banned, repeated, beyond];
    let rows = vec![LOGITS.to_vec(); draws.len()];
    assert_eq!(sample_rows(sample, &rows, &draws), [1, 3, 4, 3, 2, 1]);
}

fn logprobs_are_the_models_own(sample: Sample) {
    let total = LOGITS.map(|logit| f64::from(logit).exp()).iter().sum::<f64>().ln();
    let expected = |id: u32| (f64::from(LOGITS[id as usize]) - total) as f32;
    let sampling = Sampling { temperature: 0.3, logprobs: Some(2), ..Sampling::default() };
    let all = Sampling { logprobs: Some(9), ..Sampling::default() };
    let none = Sampling { logprobs: Some(0), ..Sampling::default() };
    let draws = [
        biased(&draw(sampling, 0.1, &[]), vec![(3, 9.0)]),
        draw(Sampling::default(), 0.5, &[]),
        draw(all, 0.5, &[]),
        draw(none, 0.5, &[]),
    ];
    let drawn = sample(&vec![LOGITS.to_vec(); 4], &draws);
    let near = |logprobs: &Option<Logprobs>, id: u32, top: &[u32]| {
        let Logprobs { chosen, top: theirs } = logprobs.as_ref().unwrap();
        assert!((chosen - expected(id)).abs() < 1e-5);
        assert_eq!(theirs.iter().map(|(id, _)| *id).collect::<Vec<_>>(), top);
        assert!(theirs.iter().all(|(id, own)| (own - expected(*id)).abs() < 1e-5));
    };
    let drawn: Vec<Drawn> = drawn.into_iter().map(Option::unwrap).collect();
    assert_eq!(drawn.iter().map(|drawn| drawn.id).collect::<Vec<_>>(), [3, 1, 1, 1]);
    near(&drawn[0].logprobs, 3, &[1, 4]);
    assert_eq!(drawn[1].logprobs, None);
    near(&drawn[2].logprobs, 1, &[1, 4, 2, 0, 3]);
    near(&drawn[3].logprobs, 1, &[]);
}
