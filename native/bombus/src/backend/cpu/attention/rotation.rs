//! cos and sin of the rows of a step.

use super::Attention;
use crate::spec::Rope;
use std::ops::Range;

/// cos and sin of every row of a step: `[rows, dim / 2]` each. Layers of a step share them.
#[derive(Default)]
pub struct Rotation {
    rope: Option<Rope>,
    positions: Vec<Range<usize>>,
    pub cos: Vec<f32>,
    pub sin: Vec<f32>,
}

impl Rotation {
    /// The positions of each segment.
    pub fn prepare(&mut self, attention: &Attention, positions: Vec<Range<usize>>) {
        let rope = &attention.spec.rope;
        if self.positions == positions && self.rope.as_ref() == Some(rope) {
            return;
        }
        let amplitude = f64::from(rope.amplitude());
        self.cos.clear();
        self.sin.clear();
        for segment in &positions {
            let frequencies = attention.frequencies(segment.end);
            for position in segment.clone() {
                for frequency in frequencies.iter() {
                    let (sin, cos) = (position as f64 * frequency).sin_cos();
                    self.cos.push((amplitude * cos) as f32);
                    self.sin.push((amplitude * sin) as f32);
                }
            }
        }
        self.positions = positions;
        self.rope = Some(rope.clone());
    }
}
