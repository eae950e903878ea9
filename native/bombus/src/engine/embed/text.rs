//! One text on its way through the model.

use super::{Pooling, Wanted};
use crate::backend::{Backend, KvCache};
use std::ops::Range;

pub struct Text<B: Backend> {
    pub ids: Vec<u32>,
    /// from its first rows to its last, but while they are in the making
    pub cache: Option<KvCache<B>>,
    /// How many of its rows are submitted.
    submitted: usize,
    /// What is read of it, at its end the answer.
    pub vector: Vec<f32>,
}

impl<B: Backend> Text<B> {
    pub fn new(ids: Vec<u32>) -> Self {
        Self { ids, cache: None, submitted: 0, vector: vec![] }
    }

    pub fn is_submitted(&self) -> bool {
        self.submitted == self.ids.len()
    }

    /// The positions of its next rows, which are submitted with this.
    pub fn next_positions(&mut self, rows: usize) -> Range<usize> {
        let start = self.submitted;
        self.submitted = self.ids.len().min(start + rows);
        start..self.submitted
    }

    /// numbers: `[outputs, width]` of rows before `end`; true where they are the last
    pub fn take(&mut self, wanted: &Wanted, numbers: &[f32], width: usize, end: usize) -> bool {
        let is_last = end == self.ids.len();
        match wanted {
            Wanted::Embedding { pooling: Pooling::Mean, .. } => self.add(numbers, width),
            _ if is_last => self.vector = numbers.to_vec(),
            _ => {}
        }
        if is_last {
            self.finish(wanted);
        }
        is_last
    }

    fn add(&mut self, numbers: &[f32], width: usize) {
        self.vector.resize(width, 0.0);
        for row in numbers.chunks_exact(width) {
            self.vector.iter_mut().zip(row).for_each(|(sum, number)| *sum += number);
        }
    }

    fn finish(&mut self, wanted: &Wanted) {
        let Wanted::Embedding { pooling, normalize, dimensions } = wanted else { return };
        if *pooling == Pooling::Mean {
            scale(&mut self.vector, 1.0 / self.ids.len() as f32);
        }
        self.vector.truncate(dimensions.unwrap_or(self.vector.len()));
        if *normalize {
            let length = self.vector.iter().map(|number| number * number).sum::<f32>().sqrt();
            // As torch's `normalize`: a vector of zeros stays one.
            scale(&mut self.vector, 1.0 / length.max(1e-12));
        }
    }
}

fn scale(vector: &mut [f32], by: f32) {
    vector.iter_mut().for_each(|number| *number *= by);
}
