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
    use crate::backend::sample_tests;

    #[test]
    fn it_samples_as_defined() {
        sample_tests::run(&|rows, draws| {
            let backend = Mlx::new(Device::Cpu).unwrap();
            backend.scope(|| {
                let shape = [rows.len() as i32, rows[0].len() as i32];
                let logits = Array::from_slice(&rows.concat(), &shape);
                backend.read(&backend.sample(&logits, draws).unwrap()).unwrap()
            })
        });
    }
}
