//! Rotary position embeddings: the frequencies of a head, and what is done to them for contexts
//! that are longer than those of the training.

use std::f64::consts::TAU;

/// Number `i` of a head is rotated together with number `i + dim / 2`, by `position * frequency`.
/// Source: Su et al., "RoFormer" (2021).
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// The numbers of a head that are rotated, from the first on: even, at most all.
    pub dim: usize,
    pub theta: f32,
    /// Number `2 i` is rotated together with number `2 i + 1`, as in the source.
    pub interleaved: bool,
    pub scaling: Scaling,
}

/// Reference: mlx-lm's `models/rope_utils.py`.
#[derive(Clone, Debug, PartialEq)]
pub enum Scaling {
    None,
    /// positions divided by `factor`
    Linear {
        factor: f64,
    },
    /// `theta` grows with the sequence once that is longer than `context`
    Dynamic {
        factor: f64,
        context: usize,
    },
    /// Llama 3.1's: slow frequencies divided by `factor`, fast ones kept, those between blended
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        context: usize,
    },
    /// Source: Peng et al., "YaRN" (2023).
    Yarn {
        factor: f64,
        context: usize,
        beta_fast: f64,
        beta_slow: f64,
        mscale: f64,
        mscale_all_dim: f64,
        /// whole pairs bound what is blended
        truncate: bool,
        /// in place of what the mscales make
        attention_factor: Option<f64>,
    },
    /// Each frequency divided by a factor of its own. Source: Ding et al., "LongRoPE" (2024).
    Long {
        factors: Vec<f64>,
        amplitude: f64,
    },
}

impl Rope {
    pub fn new(dim: usize, theta: f32, scaling: Scaling) -> Self {
        Self { dim, theta, interleaved: false, scaling }
    }

    /// Radians a position, `[dim / 2]`, in a sequence of so many positions.
    pub fn frequencies(&self, positions: usize) -> Vec<f64> {
        let (dim, theta) = (self.dim as f64, f64::from(self.theta));
        let plain =
            |theta: f64| (0..self.dim / 2).map(move |pair| theta.powf(-2.0 * pair as f64 / dim));
        match self.scaling {
            Scaling::None => plain(theta).collect(),
            Scaling::Linear { factor } => {
                plain(theta).map(|frequency| frequency / factor).collect()
            }
            Scaling::Dynamic { factor, context } => {
                let longer = positions.max(context) as f64 / context as f64;
                let growth = (factor * longer - (factor - 1.0)).powf(dim / (dim - 2.0));
                plain(theta * growth).collect()
            }
            Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, context } => {
                let [low, high] = [low_freq_factor, high_freq_factor];
                let scaled = |frequency: f64| {
                    let turns = context as f64 * frequency / TAU;
                    let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    frequency * ((1.0 - kept) / factor + kept)
                };
                plain(theta).map(scaled).collect()
            }
            Scaling::Yarn { factor, context, beta_fast, beta_slow, truncate, .. } => {
                let (low, high) = self.yarn_range(context, beta_fast, beta_slow, truncate);
                let scaled = |(pair, frequency): (usize, f64)| {
                    let kept = 1.0 - ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    frequency * ((1.0 - kept) / factor + kept)
                };
                plain(theta).enumerate().map(scaled).collect()
            }
            Scaling::Long { ref factors, .. } => {
                plain(theta).zip(factors).map(|(frequency, factor)| frequency / factor).collect()
            }
        }
    }

    /// The pairs between which frequencies are blended.
    fn yarn_range(
        &self,
        context: usize,
        beta_fast: f64,
        beta_slow: f64,
        truncate: bool,
    ) -> (f64, f64) {
        let (dim, theta) = (self.dim as f64, f64::from(self.theta));
        // The pair that turns so often within the context.
        let pair = |turns: f64| dim * (context as f64 / (turns * TAU)).ln() / (2.0 * theta.ln());
        let (low, high) = (pair(beta_fast), pair(beta_slow));
        let (low, high) = if truncate { (low.floor(), high.ceil()) } else { (low, high) };
        let (low, high) = (low.max(0.0), high.min(dim - 1.0));
        (low, if low == high { high + 0.001 } else { high })
    }

    /// What rotated heads are multiplied by.
    pub fn amplitude(&self) -> f32 {
        let (factor, mscale, mscale_all_dim) = match self.scaling {
            Scaling::Yarn { attention_factor: Some(factor), .. } => return factor as f32,
            Scaling::Yarn { factor, mscale, mscale_all_dim, .. } => {
                (factor, mscale, mscale_all_dim)
            }
            Scaling::Long { amplitude, .. } => return amplitude as f32,
            _ => return 1.0,
        };
        let of = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
        (of(mscale) / of(mscale_all_dim)) as f32
    }

    /// Whether the frequencies depend on how long a sequence is.
    pub fn is_dynamic(&self) -> bool {
        matches!(self.scaling, Scaling::Dynamic { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(scaling: Scaling) -> Rope {
        Rope::new(8, 10_000.0, scaling)
    }

    /// Values of mlx-lm 0.32.2: `1 / initialize_rope(8, 10000, False, {...}, 64)._freqs`.
    #[test]
    fn frequencies_are_those_of_mlx_lm() {
        let llama3 = rope(Scaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            context: 64,
        });
        let yarn = rope(Scaling::Yarn {
            factor: 4.0,
            context: 64,
            beta_fast: 32.0,
            beta_slow: 1.0,
            mscale: 1.0,
            mscale_all_dim: 0.0,
            truncate: true,
            attention_factor: None,
        });
        let cases: [(&Rope, [f64; 4]); 2] = [(&llama3, LLAMA3), (&yarn, YARN)];
        for (rope, expected) in cases {
            for (found, expected) in rope.frequencies(1).into_iter().zip(expected) {
                assert!((found / expected - 1.0).abs() < 1e-6, "{rope:?}: {found}, not {expected}");
            }
        }
        assert!((yarn.amplitude() - 1.138_629_4).abs() < 1e-6);
    }

    const LLAMA3: [f64; 4] = [1.0, 0.013042256, 0.00125, 0.000125];
    const YARN: [f64; 4] = [1.0, 0.0625, 0.0025, 0.00025];

    #[test]
    fn theta_grows_behind_the_context() {
        let dynamic = rope(Scaling::Dynamic { factor: 2.0, context: 64 });
        let plain = rope(Scaling::None);
        assert_eq!(dynamic.frequencies(64), plain.frequencies(64));
        let grown = 10_000.0 * 3f64.powf(8.0 / 6.0);
        assert!((dynamic.frequencies(128)[1] - grown.powf(-0.25)).abs() < 1e-12);
        assert_eq!(rope(Scaling::Linear { factor: 4.0 }).frequencies(1)[0], 0.25);
    }
}
