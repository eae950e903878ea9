//! Sampling in MLX's graph, so that the next step can be submitted before the token is known.

use super::cuda::{launches::LaunchGuard, operations};
use super::{Device, arrays};
use crate::error::Result;
use crate::sampler::{Draw, Logprobs, Sample};
use mlx_rs::ops::indexing::{argmax_axis, take_along_axis, take_axis};
use mlx_rs::{Array, Dtype, ops};

/// What is sampled, `[rows]` each, and may not have been computed yet.
pub struct Samples {
    pub ids: Array,
    /// Whether the row's logits hold NaN; its id then means nothing.
    broken: Array,
    logprobs: Option<Tops>,
    /// of a kernel that is behind them: held until they are read
    pub launch: Option<LaunchGuard>,
}

/// ln p of the ids `[rows, 1]`; the most probable ids and their ln p `[rows, top]`.
struct Tops {
    chosen: Array,
    ids: Array,
    logprobs: Array,
    /// How many each row asked for.
    wanted: Vec<Option<usize>>,
}

impl Samples {
    /// All that is to be computed.
    pub fn arrays(&self) -> impl Iterator<Item = &Array> {
        let tops = self.logprobs.iter().flat_map(|tops| [&tops.chosen, &tops.ids, &tops.logprobs]);
        [&self.ids, &self.broken].into_iter().chain(tops)
    }

    pub fn read(&self) -> Result<Vec<Option<Sample>>> {
        for array in self.arrays() {
            array.eval()?;
        }
        let ids = arrays::values::<u32>(&self.ids)?;
        let broken = arrays::values::<bool>(&self.broken)?;
        let logprobs = match &self.logprobs {
            Some(tops) => tops.read()?,
            None => vec![None; ids.len()],
        };
        let sample = |((id, broken), logprobs): ((u32, bool), Option<Logprobs>)| {
            (!broken).then_some(Sample { id, logprobs })
        };
        Ok(ids.into_iter().zip(broken).zip(logprobs).map(sample).collect())
    }
}

impl Tops {
    /// logits: as the model gave them
    fn new(logits: &Array, ids: &Array, draws: &[Draw]) -> Result<Option<Self>> {
        let wanted: Vec<Option<usize>> = draws.iter().map(|draw| draw.sampling.logprobs).collect();
        let Some(most) = wanted.iter().flatten().max() else { return Ok(None) };
        let most = (*most).min(logits.dim(-1) as usize);
        let logprobs = logits.subtract(logits.logsumexp_axis(-1, true)?)?;
        let chosen = take_along_axis(&logprobs, ids.reshape(&[-1, 1])?, -1)?;
        let order = ops::argsort_axis(logprobs.negative()?, -1)?;
        let columns: Vec<usize> = (0..most).collect();
        let top = take_axis(&order, arrays::indices(&columns), -1)?.as_dtype(Dtype::Uint32)?;
        let logprobs = take_along_axis(&logprobs, &top, -1)?.contiguous()?;
        Ok(Some(Self { chosen, ids: top.contiguous()?, logprobs, wanted }))
    }

    fn read(&self) -> Result<Vec<Option<Logprobs>>> {
        let chosen = arrays::values::<f32>(&self.chosen)?;
        let most = self.ids.dim(-1) as usize;
        let (ids, logprobs) = match most {
            0 => (vec![], vec![]),
            _ => (arrays::values::<u32>(&self.ids)?, arrays::values::<f32>(&self.logprobs)?),
        };
        let row = |(row, wanted): (usize, &Option<usize>)| {
            let top = |place| (ids[row * most + place], logprobs[row * most + place]);
            wanted.map(|wanted| Logprobs {
                chosen: chosen[row],
                top: (0..wanted.min(most)).map(top).collect(),
            })
        };
        Ok(self.wanted.iter().enumerate().map(row).collect())
    }
}

/// logits: `[rows, vocab]`
pub fn sample(logits: &Array, draws: &[Draw], device: Device) -> Result<Samples> {
    let logits = logits.as_dtype(Dtype::Float32)?;
    let plain = |draw: &Draw| draw.sampling.greedy() && !draw.changes();
    let greedy = match device.is_cuda() && draws.iter().all(plain) {
        true => operations::greedy(&logits)?,
        false => None,
    };
    let [ids, broken] = match greedy {
        Some(both) => both,
        None => {
            let broken = ops::is_nan(logits.sum_axis(-1, false)?)?;
            [ids(change(logits.clone(), draws)?, draws)?, broken]
        }
    };
    let logprobs = Tops::new(&logits, &ids, draws)?;
    Ok(Samples { ids, broken, logprobs, launch: None })
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

/// The first place where the cumulative sum passes the draw's fraction of the whole.
fn invert(weights: &Array, draws: &[Draw]) -> Result<Array> {
    let sums = weights.cumsum(-1, false, true)?;
    let total = sums.max_axis(-1, true)?;
    let passed = column(draws, |draw| draw.uniform).multiply(total)?;
    Ok(argmax_axis(sums.gt(passed)?, -1, true)?)
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

/// Penalties and biases.
fn change(logits: Array, draws: &[Draw]) -> Result<Array> {
    let vocab = logits.dim(-1) as usize;
    let mut logits = logits;
    if draws.iter().any(|draw| !draw.seen.is_empty()) {
        let mut seen = vec![false; draws.len() * vocab];
        for (draw, seen) in draws.iter().zip(seen.chunks_exact_mut(vocab)) {
            draw.seen.iter().for_each(|&id| set(seen, id, |seen| *seen = true));
        }
        let seen = Array::from_slice(&seen, logits.shape());
        let penalty = column(draws, |draw| draw.sampling.repetition_penalty);
        let positive = logits.gt(Array::from_f32(0.0))?;
        let penalized =
            ops::select(positive, logits.divide(&penalty)?, logits.multiply(&penalty)?)?;
        logits = ops::select(seen, penalized, logits)?;
    }
    if draws.iter().any(Draw::adds) {
        let mut biases = vec![0f32; draws.len() * vocab];
        for (draw, biases) in draws.iter().zip(biases.chunks_exact_mut(vocab)) {
            draw.biases().for_each(|(id, bias)| set(biases, id, |sum| *sum += bias));
            draw.mask(biases);
        }
        logits = logits.add(Array::from_slice(&biases, logits.shape()))?;
    }
    Ok(logits)
}

/// No request reaches this with ids outside the vocabulary.
fn set<T>(row: &mut [T], id: u32, change: impl FnOnce(&mut T)) {
    _ = row.get_mut(id as usize).map(change);
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
