//! cos and sin of the rows of a step.

use super::Attention;
use crate::spec::Rope;
use std::ops::Range;

/// The rotations of a step's rows, which its layers share: models have one, or two.
#[derive(Default)]
pub struct Rotations {
    positions: Vec<Range<usize>>,
    made: Vec<Rotation>,
}

/// cos and sin of every row of a step: `[rows, dim / 2]` each, times the rotation's amplitude.
pub struct Rotation {
    rope: Rope,
    pub cos: Vec<f32>,
    pub sin: Vec<f32>,
}

impl Rotations {
    /// positions: of each segment
    pub fn prepare(
        &mut self,
        attention: &Attention,
        positions: Vec<Range<usize>>,
    ) -> Option<&Rotation> {
        let rope = attention.spec.rope.as_ref()?;
        if self.positions != positions {
            self.positions = positions;
            self.made.clear();
        }
        let place = match self.made.iter().position(|made| made.rope == *rope) {
            Some(place) => place,
            None => {
                self.made.push(Rotation::new(attention, rope, &self.positions));
                self.made.len() - 1
            }
        };
        self.made.get(place)
    }
}

impl Rotation {
    fn new(attention: &Attention, rope: &Rope, positions: &[Range<usize>]) -> Self {
        let amplitude = f64::from(rope.amplitude());
        let (mut cos, mut sin) = (vec![], vec![]);
        for segment in positions {
            let frequencies = attention.frequencies(rope, segment.end);
            for position in segment.clone() {
                for frequency in frequencies.iter() {
                    let (own_sin, own_cos) = (position as f64 * frequency).sin_cos();
                    cos.push((amplitude * own_cos) as f32);
                    sin.push((amplitude * own_sin) as f32);
                }
            }
        }
        Self { rope: rope.clone(), cos, sin }
    }

    pub fn dim(&self) -> usize {
        self.rope.dim
    }

    pub fn is_interleaved(&self) -> bool {
        self.rope.interleaved
    }
}
