//! How the next token is chosen: the options of a request, and what each step draws with.
//!
//! A backend samples by inverting the cumulative distribution at a uniform number that comes
//! from the request's seed and the token's place alone. So a seed repeats, whatever else is in
//! the batch.

use crate::error::{Error, Result};
use crate::grammar::Allowed;
use std::collections::{HashMap, HashSet};
use std::ops::RangeInclusive;
use std::sync::Arc;

/// The sampling options of a request. They apply in this order: repetition penalty, presence and
/// frequency penalty, logit bias, temperature, top_k, top_p, min_p, as in transformers and vLLM.
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
    /// Taken from the logits of tokens that were generated before.
    pub presence_penalty: f32,
    /// The same, once for each time.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// How many of the most probable tokens to report with each token; the model's own
    /// log-probabilities, before all of the above.
    pub logprobs: Option<usize>,
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
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: vec![],
            logprobs: None,
            seed: 0,
        }
    }
}

/// Beyond these, logits of float32 would become infinite or NaN.
const TEMPERATURES: RangeInclusive<f32> = 1e-30..=1e6;
const REPETITION_PENALTIES: RangeInclusive<f32> = 1e-6..=1e6;
const ADDED: RangeInclusive<f32> = -1e6..=1e6;

impl Sampling {
    pub fn check(&self) -> Result<()> {
        let share = |value: f32| (0.0..=1.0).contains(&value);
        let bias = self.logit_bias.iter().find(|(_, bias)| !ADDED.contains(bias));
        let penalties = [self.presence_penalty, self.frequency_penalty];
        let wrong = if !(TEMPERATURES.contains(&self.temperature) || self.temperature == 0.0) {
            Some(format!("temperature of 0, or in 1e-30..1e6, got: {}", self.temperature))
        } else if !share(self.top_p) {
            Some(format!("top_p in 0..1, got: {}", self.top_p))
        } else if !share(self.min_p) {
            Some(format!("min_p in 0..1, got: {}", self.min_p))
        } else if !REPETITION_PENALTIES.contains(&self.repetition_penalty) {
            Some(format!("repetition_penalty in 1e-6..1e6, got: {}", self.repetition_penalty))
        } else if let Some(penalty) = penalties.iter().find(|penalty| !ADDED.contains(penalty)) {
            Some(format!("presence_penalty and frequency_penalty within 1e6 of 0, got: {penalty}"))
        } else {
            bias.map(|(id, bias)| format!("logit_bias within 1e6 of 0, got: {bias} for {id}"))
        };
        wrong.map_or(Ok(()), |wrong| Err(Error::Request(format!("expected a {wrong}"))))
    }

    pub fn greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Whether the choice depends on the tokens generated before, so that they must be known.
    pub fn penalizes(&self) -> bool {
        self.repetition_penalty != 1.0 || self.counts()
    }

    fn counts(&self) -> bool {
        self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

/// The tokens that penalties fall on, taken in as they come: a token costs the same behind a long
/// text as behind a short one.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// How many tokens of prompt and text `seen` holds, and how many of the text `counts`.
    read: [usize; 2],
    seen: Arc<Vec<u32>>,
    known: HashSet<u32>,
    /// How often each token was generated.
    counts: Arc<Vec<(u32, f32)>>,
    /// Where each stands in `counts`.
    places: HashMap<u32, usize>,
}

impl History {
    /// Takes in what is new, as far as these options look at it.
    pub fn extend(&mut self, sampling: &Sampling, prompt: &[u32], generated: &[u32]) {
        if sampling.repetition_penalty != 1.0 {
            let new = prompt.iter().chain(generated).skip(self.read[0]);
            let new = new.copied().filter(|id| self.known.insert(*id));
            Arc::make_mut(&mut self.seen).extend(new);
            self.read[0] = prompt.len() + generated.len();
        }
        if sampling.counts() {
            let counts = Arc::make_mut(&mut self.counts);
            for &id in generated.iter().skip(self.read[1]) {
                let place = *self.places.entry(id).or_insert(counts.len());
                match counts.get_mut(place) {
                    Some((_, count)) => *count += 1.0,
                    None => counts.push((id, 1.0)),
                }
            }
            self.read[1] = generated.len();
        }
    }
}

/// One row's draw; greedy by default.
#[derive(Clone, Debug, Default)]
pub struct Draw {
    pub sampling: Arc<Sampling>,
    /// in `0.0..1.0`
    pub uniform: f32,
    /// The tokens that the repetition penalty falls on.
    pub seen: Arc<Vec<u32>>,
    /// How often each token was generated, where that counts.
    pub counts: Arc<Vec<(u32, f32)>>,
    /// The tokens that it must not be.
    pub withheld: Vec<u32>,
    /// The tokens that it may be, where a grammar says so.
    pub allowed: Option<Allowed>,
}

impl Draw {
    /// For token number `place` of a text.
    pub fn new(
        sampling: &Arc<Sampling>,
        place: usize,
        history: &History,
        withheld: Vec<u32>,
    ) -> Self {
        let (seen, counts) = (history.seen.clone(), history.counts.clone());
        let uniform = uniform(sampling.seed, place);
        Self { sampling: sampling.clone(), uniform, seen, counts, withheld, allowed: None }
    }

    /// What is added to logits, after the repetition penalty. A token may come more than once.
    pub fn biases(&self) -> impl Iterator<Item = (u32, f32)> {
        let sampling = &self.sampling;
        let penalty = |&(id, count): &(u32, f32)| {
            (id, -(sampling.presence_penalty + count * sampling.frequency_penalty))
        };
        let withheld = self.withheld.iter().map(|id| (*id, f32::NEG_INFINITY));
        let own = sampling.logit_bias.iter().copied();
        own.chain(self.counts.iter().map(penalty)).chain(withheld)
    }

    /// Whether logits are added to, or left out.
    pub fn adds(&self) -> bool {
        self.allowed.is_some() || self.biases().next().is_some()
    }

    /// Leaves out of a row's logits, or of what is added to them, what a grammar does not allow.
    pub fn mask(&self, row: &mut [f32]) {
        let Some(allowed) = &self.allowed else { return };
        for (id, logit) in (0..).zip(row) {
            if !allowed.has(id) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }

    /// Whether logits change before one is chosen.
    pub fn changes(&self) -> bool {
        !self.seen.is_empty() || self.adds()
    }
}

/// A token that was drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub id: u32,
    /// where they were asked for
    pub logprobs: Option<Logprobs>,
}

/// ln p of a token, and of the most probable ones, by the model alone.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    pub chosen: f32,
    /// the most probable first
    pub top: Vec<(u32, f32)>,
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
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

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
        for bias in [f32::NAN, f32::INFINITY, -1e7] {
            let wrong = Sampling { logit_bias: vec![(3, bias)], ..Sampling::default() };
            assert!(wrong.check().unwrap_err().to_string().contains("logit_bias"));
        }
        for repetition_penalty in [0.0, 1e-40, 1e-7, 1e7, -1.0, f32::NAN] {
            let wrong = Sampling { repetition_penalty, ..Sampling::default() };
            assert!(wrong.check().unwrap_err().to_string().contains("1e-6..1e6"));
        }
        for temperature in [1e-40, 2e6, -1.0] {
            let wrong = Sampling { temperature, ..Sampling::default() };
            assert!(wrong.check().unwrap_err().to_string().contains("1e-30..1e6"));
        }
    }

    /// All that a draw adds to each token, from a text that came piece by piece.
    fn added(sampling: &Arc<Sampling>, text: &[u32], withheld: Vec<u32>) -> BTreeMap<u32, f32> {
        let mut history = History::default();
        (0..=text.len()).for_each(|end| history.extend(sampling, &[4, 4, 9], &text[..end]));
        let draw = Draw::new(sampling, 0, &history, withheld);
        let mut sums = BTreeMap::new();
        draw.biases().for_each(|(id, bias)| *sums.entry(id).or_default() += bias);
        sums
    }

    #[test]
    fn what_is_added_to_logits_adds_up() {
        let sampling = Arc::new(Sampling {
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            logit_bias: vec![(7, 1.0), (9, 2.0), (7, 1.0)],
            ..Sampling::default()
        });
        // The prompt's tokens are no business of these penalties.
        let right = [(2, f32::NEG_INFINITY), (5, -0.75), (7, 1.0), (9, 2.0)];
        assert_eq!(added(&sampling, &[7, 5, 7], vec![2]), BTreeMap::from(right));
        assert!(added(&Arc::default(), &[7, 5, 7], vec![]).is_empty());
    }

    proptest! {
        /// The definition: a set of all tokens, and a count of those generated.
        #[test]
        fn a_history_is_what_there_was(
            prompt in prop::collection::vec(0u32..20, 0..20),
            text in prop::collection::vec(0u32..20, 0..40),
            steps in prop::collection::vec(0usize..5, 1..20),
        ) {
            let sampling = Sampling {
                repetition_penalty: 1.5,
                frequency_penalty: 0.5,
                ..Sampling::default()
            };
            let (mut history, mut end) = (History::default(), 0);
            for step in steps {
                end = text.len().min(end + step);
                history.extend(&sampling, &prompt, &text[..end]);
                let mut seen = (*history.seen).clone();
                seen.sort_unstable();
                let all: BTreeSet<u32> = prompt.iter().chain(&text[..end]).copied().collect();
                prop_assert_eq!(seen, all.into_iter().collect::<Vec<_>>());
                for &(id, count) in history.counts.iter() {
                    let times = text[..end].iter().filter(|other| **other == id).count();
                    prop_assert_eq!(count, times as f32);
                }
                let distinct: BTreeSet<u32> = text[..end].iter().copied().collect();
                prop_assert_eq!(history.counts.len(), distinct.len());
            }
        }
    }
}
