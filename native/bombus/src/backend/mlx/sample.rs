//! Sampling in MLX's graph, so that the next step can be submitted before the token is known.

use crate::error::Result;
use crate::sampler::Draw;
use mlx_rs::ops::indexing::{argmax_axis, take_along_axis};
use mlx_rs::{Array, Dtype, ops};

/// What is sampled, `[rows]` each, and may not have been computed yet.
pub struct Samples {
    pub ids: Array,
    /// Whether the row's logits hold what is no number; its id then means nothing.
    pub broken: Array,
}

/// logits: `[rows, vocab]`
pub fn sample(logits: &Array, draws: &[Draw]) -> Result<Samples> {
    let logits = logits.as_dtype(Dtype::Float32)?;
    let broken = ops::is_nan(logits.sum_axis(-1, false)?)?;
    Ok(Samples { ids: ids(penalize(logits, draws)?, draws)?, broken })
}

fn ids(logits: Array, draws: &[Draw]) -> Result<Array> {
    let greedy = argmax_axis(&logits, -1, true)?;
    if draws.iter().all(|draw| draw.sampling.greedy()) {
        return flat(greedy);
    }
    let is_greedy = column(draws, |draw| draw.sampling.greedy() as u8 as f32);
    let drawn = draw_tokens(&logits, draws)?;
    flat(ops::select(is_greedy.gt(Array::from_f32(0.5))?, greedy, drawn)?)
}

fn flat(ids: Array) -> Result<Array> {
    Ok(ids.flatten(None, None)?.as_dtype(Dtype::Uint32)?)
}

fn column(draws: &[Draw], value: impl Fn(&Draw) -> f32) -> Array {
    let values: Vec<f32> = draws.iter().map(value).collect();
    Array::from_slice(&values, &[values.len() as i32, 1])
}

/// Inverts the cumulative distribution of each row at its uniform number -> `[rows, 1]`.
fn draw_tokens(logits: &Array, draws: &[Draw]) -> Result<Array> {
    // What a greedy row draws is not used.
    let temperature = column(draws, |draw| match draw.sampling.greedy() {
        true => 1.0,
        false => draw.sampling.temperature,
    });
    // The maximum goes first: a tiny temperature must not make infinities of the logits.
    let highest = logits.max_axis(-1, true)?;
    let scaled = logits.subtract(highest)?.divide(temperature)?;
    let probs = ops::softmax_axis(&scaled, -1, true)?;
    let sorts = |draw: &Draw| draw.sampling.top_k > 0 || draw.sampling.top_p < 1.0;
    if !draws.iter().any(sorts) {
        return invert(&min_p(probs, draws)?, draws);
    }
    let order = ops::argsort_axis(scaled.negative()?, -1)?;
    let sorted = take_along_axis(&probs, &order, -1)?;
    let kept = min_p(top_p(top_k(sorted, draws)?, draws)?, draws)?;
    Ok(take_along_axis(&order, invert(&kept, draws)?, -1)?)
}

/// The first place where the cumulative sum passes the draw's share of the whole.
fn invert(weights: &Array, draws: &[Draw]) -> Result<Array> {
    let sums = weights.cumsum(-1, false, true)?;
    let total = sums.max_axis(-1, true)?;
    let share = column(draws, |draw| draw.uniform).multiply(total)?;
    Ok(argmax_axis(sums.gt(share)?, -1, true)?)
}

/// probs: sorted, the highest first
fn top_k(probs: Array, draws: &[Draw]) -> Result<Array> {
    let vocab = probs.dim(-1);
    let rank = ops::arange::<i32, f32>(None, vocab, None)?;
    let k = column(draws, |draw| match draw.sampling.top_k {
        0 => f32::INFINITY,
        k => k as f32,
    });
    keep(&probs, rank.lt(k)?)
}

/// probs: sorted, the highest first. Keeps those before which less than top_p of the rest stands.
fn top_p(probs: Array, draws: &[Draw]) -> Result<Array> {
    let before = probs.cumsum(-1, false, false)?;
    // The first has nothing before it and stays, even where top_p is 0.
    let limit = column(draws, |draw| draw.sampling.top_p.max(f32::MIN_POSITIVE));
    let limit = limit.multiply(probs.sum_axis(-1, true)?)?;
    let all = column(draws, |draw| (draw.sampling.top_p >= 1.0) as u8 as f32);
    let kept = before.lt(limit)?.logical_or(all.gt(Array::from_f32(0.5))?)?;
    keep(&probs, kept)
}

fn min_p(probs: Array, draws: &[Draw]) -> Result<Array> {
    if draws.iter().all(|draw| draw.sampling.min_p == 0.0) {
        return Ok(probs);
    }
    let limit = column(draws, |draw| draw.sampling.min_p).multiply(probs.max_axis(-1, true)?)?;
    keep(&probs, probs.ge(limit)?)
}

fn keep(probs: &Array, kept: Array) -> Result<Array> {
    Ok(ops::select(kept, probs, Array::from_f32(0.0))?)
}

fn penalize(logits: Array, draws: &[Draw]) -> Result<Array> {
    if draws.iter().all(|draw| draw.seen.is_empty()) {
        return Ok(logits);
    }
    let vocab = logits.dim(-1) as usize;
    let mut seen = vec![false; draws.len() * vocab];
    for (row, draw) in draws.iter().enumerate() {
        let seen = &mut seen[row * vocab..][..vocab];
        draw.seen.iter().for_each(|&id| seen[id as usize] = true);
    }
    let seen = Array::from_slice(&seen, logits.shape());
    let penalty = column(draws, |draw| draw.sampling.repetition_penalty);
    let positive = logits.gt(Array::from_f32(0.0))?;
    let penalized = ops::select(positive, logits.divide(&penalty)?, logits.multiply(&penalty)?)?;
    Ok(ops::select(seen, penalized, logits)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Backend;
    use crate::backend::mlx::{Device, Mlx};
    use crate::sampler::Sampling;
    use proptest::prelude::*;

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

    fn sample_rows(rows: &[Vec<f32>], draws: &[Draw]) -> Vec<u32> {
        let backend = Mlx::new(Device::Cpu).unwrap();
        backend.scope(|| {
            let shape = [rows.len() as i32, rows[0].len() as i32];
            let logits = Array::from_slice(&rows.concat(), &shape);
            let samples = sample(&logits, draws).unwrap();
            backend.read(&samples).unwrap().into_iter().map(Option::unwrap).collect()
        })
    }

    fn draw(sampling: Sampling, uniform: f32, seen: &[u32]) -> Draw {
        Draw { sampling, uniform, seen: seen.to_vec() }
    }

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, -1.0, 2.5];

    #[test]
    fn greedy_takes_the_highest_even_beside_sampled_rows() {
        let hot = Sampling { temperature: 5.0, ..Sampling::default() };
        let draws = [draw(Sampling::default(), 0.99, &[]), draw(hot, 0.9999, &[])];
        assert_eq!(sample_rows(&[LOGITS.to_vec(), LOGITS.to_vec()], &draws), [1, 4]);
    }

    #[test]
    fn a_repetition_penalty_falls_on_seen_tokens() {
        let sampling = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
        assert_eq!(sample_rows(&[LOGITS.to_vec()], &[draw(sampling, 0.5, &[1, 4])]), [2]);
    }

    #[test]
    fn tokens_come_as_often_as_their_probability() {
        let sampling = Sampling { temperature: 0.7, ..Sampling::default() };
        let count = 2000;
        let draws: Vec<Draw> = (0..count)
            .map(|index| draw(sampling.clone(), (index as f32 + 0.5) / count as f32, &[]))
            .collect();
        let ids = sample_rows(&vec![LOGITS.to_vec(); count], &draws);
        let weights = LOGITS.map(|logit| (f64::from(logit) / 0.7).exp());
        for (id, weight) in weights.iter().enumerate() {
            let share = ids.iter().filter(|&&drawn| drawn as usize == id).count() as f64;
            let expected = weight / weights.iter().sum::<f64>();
            assert!((share / count as f64 - expected).abs() < 2e-3, "{id}");
        }
    }

    #[test]
    fn logits_that_are_no_numbers_are_found() {
        let backend = Mlx::new(Device::Cpu).unwrap();
        backend.scope(|| {
            let logits = [1.0, f32::NAN, 3.0, 1.0, f32::NEG_INFINITY, 3.0];
            let logits = Array::from_slice(&logits, &[2, 3]);
            let draws = [draw(Sampling::default(), 0.5, &[]), draw(Sampling::default(), 0.5, &[])];
            assert_eq!(backend.read(&sample(&logits, &draws).unwrap()).unwrap(), [None, Some(2)]);
        });
    }

    #[test]
    fn extreme_temperatures_and_logits_stay_finite() {
        let cold = Sampling { temperature: 1e-6, ..Sampling::default() };
        let logits = vec![1e4, -1e4, f32::MIN, 9.999e3, 0.0];
        assert_eq!(sample_rows(&[logits], &[draw(cold, 0.999, &[])]), [0]);
    }

    proptest! {
        #[test]
        fn what_is_drawn_passes_the_filters(
            logits in prop::collection::vec(-5.0f32..5.0, 8),
            temperature in prop_oneof![Just(0.0f32), 0.3f32..3.0],
            top_k in 0usize..8,
            top_p in 0.05f32..1.0,
            min_p in 0.0f32..0.9,
            uniform in 0.0f32..0.99999,
        ) {
            let sampling =
                Sampling { temperature, top_k, top_p, min_p, ..Sampling::default() };
            let draw = draw(sampling, uniform, &[]);
            // A token at the very edge of a filter may fall on either side of it.
            let wider = |by: f32| {
                let mut wide = draw.clone();
                wide.sampling.top_p = (top_p * (1.0 + by)).min(1.0);
                wide.sampling.min_p = min_p * (1.0 - by);
                reference(&logits, &wide)
            };
            let id = sample_rows(std::slice::from_ref(&logits), std::slice::from_ref(&draw))[0] as usize;
            prop_assert!(wider(1e-4).contains(&id), "{id} of {:?}", wider(0.0));
        }
    }
}
