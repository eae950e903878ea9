//! How the next token is chosen: the options of a request, and what each step draws with.
//!
//! A backend samples by inverting the cumulative distribution at a uniform number that comes
//! from the request's seed and the token's place alone. So a seed repeats, whatever else is in
//! the batch.

use crate::error::{Error, Result};

/// The sampling options of a request. The filters apply in this order: repetition penalty,
/// temperature, top_k, top_p, min_p, as in transformers.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep this many of the most probable tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the most probable tokens whose probabilities add up to this.
    pub top_p: f32,
    /// Keep tokens with at least this share of the highest probability.
    pub min_p: f32,
    /// Divides the positive logits of tokens seen before, multiplies the negative ones.
    pub repetition_penalty: f32,
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }
}

impl Sampling {
    pub fn check(&self) -> Result<()> {
        let positive = |value: f32| value > 0.0 && value.is_finite();
        let share = |value: f32| (0.0..=1.0).contains(&value);
        let wrong = if !(positive(self.temperature) || self.temperature == 0.0) {
            Some(format!("temperature of at least 0, got: {}", self.temperature))
        } else if !share(self.top_p) {
            Some(format!("top_p in 0..1, got: {}", self.top_p))
        } else if !share(self.min_p) {
            Some(format!("min_p in 0..1, got: {}", self.min_p))
        } else if !positive(self.repetition_penalty) {
            Some(format!("repetition_penalty above 0, got: {}", self.repetition_penalty))
        } else {
            None
        };
        wrong.map_or(Ok(()), |wrong| Err(Error::Request(format!("expected a {wrong}"))))
    }

    pub fn greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Whether the choice depends on the tokens before, so that they must be known.
    pub fn penalizes(&self) -> bool {
        self.repetition_penalty != 1.0
    }

    /// What token number `place` of the request is drawn with; `seen` are the tokens before it.
    pub fn draw(&self, place: usize, seen: impl Iterator<Item = u32>) -> Draw {
        let mut seen: Vec<u32> = if self.penalizes() { seen.collect() } else { vec![] };
        seen.sort_unstable();
        seen.dedup();
        Draw { sampling: self.clone(), uniform: uniform(self.seed, place), seen }
    }
}

/// One row's draw; greedy by default.
#[derive(Clone, Debug, Default)]
pub struct Draw {
    pub sampling: Sampling,
    /// in `0.0..1.0`
    pub uniform: f32,
    /// The tokens that the repetition penalty falls on.
    pub seen: Vec<u32>,
}

/// A uniform number for each place in a seed's sequence: SplitMix64 (Steele, Lea and Flood,
/// "Fast splittable pseudorandom number generators", 2014), its upper 24 bits.
fn uniform(seed: u64, place: usize) -> f32 {
    // The seed is mixed before the place is added: neighbouring seeds must not share draws.
    let state = mix(seed).wrapping_add((place as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    (mix(state) >> 40) as f32 / (1u64 << 24) as f32
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_repeats_and_neighbours_differ() {
        let draws = |seed| (0..100).map(|place| uniform(seed, place)).collect::<Vec<_>>();
        assert_eq!(draws(0), draws(0));
        assert_ne!(draws(0), draws(1));
        // No shift of one seed's draws is another's.
        assert!((0..99).all(|place| uniform(0, place + 1) != uniform(1, place)));
    }

    #[test]
    fn draws_are_uniform() {
        let draws: Vec<f32> =
            (0..100).flat_map(|seed| (0..100).map(move |place| uniform(seed, place))).collect();
        assert!(draws.iter().all(|draw| (0.0..1.0).contains(draw)));
        let mean = draws.iter().sum::<f32>() / draws.len() as f32;
        assert!((mean - 0.5).abs() < 0.015, "{mean}");
    }

    #[test]
    fn wrong_options_are_named() {
        let wrong = Sampling { temperature: f32::NAN, ..Sampling::default() };
        assert!(wrong.check().unwrap_err().to_string().contains("temperature"));
        let wrong = Sampling { top_p: 1.5, ..Sampling::default() };
        assert!(wrong.check().unwrap_err().to_string().contains("top_p"));
    }
}
