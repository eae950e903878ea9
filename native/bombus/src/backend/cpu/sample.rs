//! Sampling, row by row. The filters are those of `sampler`, in its order.

use super::rows::load_partial;
use super::simd::{Kernel, LANES, Simd};
use super::tensor::{SendPtr, Tensor};
use super::{Cpu, Draw, Sample, lock};
use crate::sampler::Logprobs;
use std::cell::RefCell;
use std::sync::Mutex;

/// One token for each row; none where its logits hold NaN.
pub struct Samples(Vec<Option<Sample>>);

impl Samples {
    /// The token of a row, where there is one.
    pub fn id(&self, row: usize) -> Option<u32> {
        self.0.get(row)?.as_ref().map(|sample| sample.id)
    }

    pub fn read(&self) -> Vec<Option<Sample>> {
        self.0.clone()
    }
}

/// logits: `[rows, vocab]`
pub fn sample(cpu: &Cpu, logits: &Tensor, draws: &[Draw]) -> Samples {
    let samples = Mutex::new(vec![None; logits.rows]);
    cpu.pool.each(logits.rows, |row| {
        let (logits, draw) = (logits.row(row), &draws[row]);
        let sample = sample_row(cpu, logits, draw).map(|id| {
            let top = draw.sampling.logprobs;
            Sample { id, logprobs: top.map(|top| logprobs(cpu, logits, id, top)) }
        });
        lock(&samples)[row] = sample;
    });
    Samples(std::mem::take(&mut *lock(&samples)))
}

/// ln p of token `id`, and of the `top` most probable.
fn logprobs(cpu: &Cpu, logits: &[f32], id: u32, top: usize) -> Logprobs {
    let logprob = with_normalizer(cpu, logits);
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let logit = |id: u32| logits[id as usize];
    let by_logit = |a: &u32, b: &u32| logit(*b).total_cmp(&logit(*a)).then(a.cmp(b));
    let top = top.min(order.len());
    if 0 < top && top < order.len() {
        order.select_nth_unstable_by(top - 1, by_logit);
    }
    order.truncate(top);
    order.sort_unstable_by(by_logit);
    Logprobs {
        chosen: logprob(logit(id)),
        top: order.into_iter().map(|id| (id, logprob(logit(id)))).collect(),
    }
}

/// From a logit of this row to ln p.
fn with_normalizer(cpu: &Cpu, logits: &[f32]) -> impl Fn(f32) -> f32 {
    let highest = highest(cpu, logits);
    let total = with_weights(|weights| weigh(cpu, logits, highest, 1.0, weights)).ln();
    move |logit| (f64::from(logit - highest) - total) as f32
}

/// ln p of one target for each row; NaN where a logit of the row is NaN
pub fn log_probs(cpu: &Cpu, logits: &Tensor, targets: &[u32]) -> Vec<f32> {
    let mut log_probs = vec![0.0; logits.rows];
    let out = SendPtr(log_probs.as_mut_ptr());
    cpu.pool.each(logits.rows, |row| {
        let (logits, target) = (logits.row(row), targets[row] as usize);
        let log_prob = with_normalizer(cpu, logits)(logits[target]);
        // SAFETY: each row is written by one thread.
        unsafe { *out.at(row) = log_prob };
    });
    log_probs
}

fn sample_row(cpu: &Cpu, logits: &[f32], draw: &Draw) -> Option<u32> {
    if !draw.changes() {
        return choose(cpu, logits, draw);
    }
    let mut changed = logits.to_vec();
    let penalty = draw.sampling.repetition_penalty;
    // No request reaches this with ids outside the vocabulary.
    for &id in draw.seen.iter() {
        let Some(logit) = changed.get_mut(id as usize) else { continue };
        *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
    }
    for (id, bias) in draw.biases() {
        changed.get_mut(id as usize).into_iter().for_each(|logit| *logit += bias);
    }
    draw.mask(&mut changed);
    choose(cpu, &changed, draw)
}

fn choose(cpu: &Cpu, logits: &[f32], draw: &Draw) -> Option<u32> {
    let highest = highest(cpu, logits);
    if highest.is_nan() {
        return None;
    }
    if draw.sampling.greedy() {
        return position(logits.iter().map(|&logit| logit == highest));
    }
    with_weights(|weights| {
        let total = weigh(cpu, logits, highest, draw.sampling.temperature, weights);
        let min_p = draw.sampling.min_p;
        if draw.sampling.top_k == 0 && draw.sampling.top_p >= 1.0 {
            let kept = |weight: f32| if weight >= min_p { f64::from(weight) } else { 0.0 };
            let total = if min_p > 0.0 { weights.iter().map(|&w| kept(w)).sum() } else { total };
            return invert(weights.iter().map(|&weight| kept(weight)), total, draw.uniform);
        }
        let kept = filter(weights, total, draw);
        let total = kept.iter().map(|&(_, weight)| f64::from(weight)).sum();
        let place = invert(kept.iter().map(|&(_, weight)| f64::from(weight)), total, draw.uniform);
        Some(kept[place? as usize].0)
    })
}

fn position(mut found: impl Iterator<Item = bool>) -> Option<u32> {
    found.position(|found| found).map(|place| place as u32)
}

/// The first place where the cumulative sum passes the draw's fraction of the whole; the most
/// probable one where it never does, since sums in another order may fall short by a rounding.
fn invert(weights: impl Iterator<Item = f64>, total: f64, uniform: f32) -> Option<u32> {
    let passed = f64::from(uniform) * total;
    let (mut sum, mut best) = (0.0, (0.0, None));
    for (place, weight) in weights.enumerate() {
        sum += weight;
        if sum > passed {
            return Some(place as u32);
        }
        if weight > best.0 {
            best = (weight, Some(place as u32));
        }
    }
    best.1
}

/// What top_k, top_p and min_p leave, the most probable first. weights: the highest is 1
fn filter(weights: &[f32], total: f64, draw: &Draw) -> Vec<(u32, f32)> {
    let sampling = &draw.sampling;
    let top_k = if sampling.top_k == 0 { usize::MAX } else { sampling.top_k };
    // Only what may be kept is sorted: weights above a limit that is lowered until they suffice.
    let mut limit = 1.0 / 16.0;
    let mut kept = loop {
        let above: Vec<(u32, f32)> =
            (0u32..).zip(weights.iter().copied()).filter(|(_, weight)| *weight >= limit).collect();
        let mass: f64 = above.iter().map(|&(_, weight)| f64::from(weight)).sum();
        let enough = above.len() >= top_k
            || (sampling.top_k == 0 && mass >= f64::from(sampling.top_p) * total);
        if enough || limit == 0.0 {
            break above;
        }
        limit = if limit > 1e-9 { limit / 64.0 } else { 0.0 };
    };
    kept.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    kept.truncate(top_k);
    if sampling.top_p < 1.0 {
        let total = match sampling.top_k {
            0 => total,
            _ => kept.iter().map(|&(_, weight)| f64::from(weight)).sum(),
        };
        let mut before = 0.0;
        kept.retain(|&(_, weight)| {
            // The first has nothing before it.
            let keep = before == 0.0 || before < f64::from(sampling.top_p) * total;
            before += f64::from(weight);
            keep
        });
    }
    kept.retain(|&(_, weight)| weight >= sampling.min_p);
    kept
}

thread_local! {
    static WEIGHTS: RefCell<Vec<f32>> = RefCell::default();
}

fn with_weights<T>(work: impl FnOnce(&mut Vec<f32>) -> T) -> T {
    WEIGHTS.with_borrow_mut(work)
}

/// The highest logit; NaN where one of them is NaN.
fn highest(cpu: &Cpu, logits: &[f32]) -> f32 {
    // SAFETY: the kernel only reads the slice.
    unsafe { cpu.level.run(Highest(logits)) }
}

/// `weights = e^((logits - highest) / temperature)`; -> their sum
fn weigh(cpu: &Cpu, logits: &[f32], highest: f32, temperature: f32, weights: &mut Vec<f32>) -> f64 {
    weights.resize(logits.len(), 0.0);
    // SAFETY: there are as many weights as logits.
    unsafe { cpu.level.run(Weigh { logits, highest, temperature, weights }) }
}

struct Highest<'a>(&'a [f32]);

impl Kernel for Highest<'_> {
    type Output = f32;

    /// # Safety
    /// Nothing but the machine's level, as of `Kernel::run`.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        let logits = self.0;
        let zero = S::splat(0.0);
        let mut peak = S::splat(f32::NEG_INFINITY);
        let mut check = zero;
        for place in (0..logits.len()).step_by(LANES) {
            let lanes = LANES.min(logits.len() - place);
            let x = match lanes {
                LANES => S::load(logits.as_ptr().add(place)),
                // Zeros behind the last would take part.
                _ => S::splat(f32::NEG_INFINITY),
            };
            peak = S::max(peak, x);
            // Infinities are no fault, but infinity times 0 is NaN.
            check = S::fma(S::max(S::splat(f32::MIN), S::min(S::splat(f32::MAX), x)), zero, check);
        }
        let rest = &logits[logits.len() / LANES * LANES..];
        let peak = rest.iter().fold(S::largest(peak), |peak, &x| if x > peak { x } else { peak });
        let broken = S::sum(check).is_nan() || rest.iter().any(|x| x.is_nan());
        if broken || peak == f32::INFINITY { f32::NAN } else { peak }
    }
}

struct Weigh<'a> {
    logits: &'a [f32],
    highest: f32,
    temperature: f32,
    weights: &'a mut [f32],
}

/// A sum of f32 goes no further than this before it is added to one of f64.
const SUM: usize = 64 * LANES;

impl Kernel for Weigh<'_> {
    type Output = f64;

    /// # Safety
    /// There are as many weights as logits.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f64 {
        let mut total = 0.0;
        let chunks = self.logits.chunks(SUM).zip(self.weights.chunks_mut(SUM));
        for (logits, weights) in chunks {
            let mut sum = S::splat(0.0);
            for place in (0..logits.len()).step_by(LANES) {
                let lanes = LANES.min(logits.len() - place);
                let x = S::sub(load_partial::<S>(logits, place, lanes), S::splat(self.highest));
                let weight = S::exp(S::div(x, S::splat(self.temperature)));
                S::store_partial(weights.as_mut_ptr().add(place), weight, lanes);
                // The lanes behind the last are taken as they were stored: not at all.
                sum = S::add(sum, load_partial::<S>(weights, place, lanes));
            }
            total += f64::from(S::sum(sum));
        }
        total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_that_falls_short_does_not_draw_what_is_not_probable() {
        let weights = [0.5, 1.0, 1e-38];
        assert_eq!(invert(weights.into_iter(), 1.5 + 1e-6, 0.999_999_9), Some(1));
        assert_eq!(invert(weights.into_iter(), 1.5, 0.1), Some(0));
    }
    use crate::backend::Backend;
    use crate::backend::cpu::{Level, Options};
    use crate::backend::sample_tests;

    #[test]
    fn it_samples_as_defined() {
        for level in Level::all() {
            let cpu = Cpu::new(Options { threads: 2, level }).unwrap();
            sample_tests::run(&|rows, draws| {
                let width = rows[0].len();
                let logits = cpu.map(rows.len(), width, |row, out| out.copy_from_slice(&rows[row]));
                cpu.read(&cpu.sample(&logits, draws).unwrap()).unwrap()
            });
        }
    }
}
