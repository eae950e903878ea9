//! Quantization of matrices in memory, row by row on several threads.
//! Reference: MLX's `backend/cpu/quantized.cpp`, whose numbers these are.

use super::codes;
use super::float::Float;
use crate::error::Result;
use crate::quant::{Array, Quantized, unpacked};
use crate::spec::Quantization;
use safetensors::tensor::Dtype;

/// No scale is smaller.
const SMALLEST: f32 = 1e-7;

pub fn numbers(array: &Array) -> Result<Vec<f32>> {
    Ok(Float::of(array.dtype)?.to_f32(&array.bytes))
}

pub fn bytes(dtype: Dtype, numbers: &[f32]) -> Result<Vec<u8>> {
    Ok(match Float::of(dtype)? {
        Float::F32 => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Float::F16 => numbers.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect(),
        Float::Bf16 => {
            numbers.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect()
        }
    })
}

pub fn quantize(
    w: &Array,
    rows: usize,
    columns: usize,
    layout: Quantization,
    threads: usize,
) -> Result<Quantized> {
    let float = Float::of(w.dtype)?;
    let Quantization { group_size, bits } = layout;
    let (groups, packed) = (columns / group_size, columns * bits / 8);
    let mut weight = vec![0; rows * packed];
    let mut numbers = vec![[0.0; 2]; rows * groups];
    let width = columns * float.bytes();
    let work = rows.div_ceil(threads.max(1));
    std::thread::scope(|scope| {
        let chunks = w.bytes.chunks(work * width);
        let chunks =
            chunks.zip(weight.chunks_mut(work * packed)).zip(numbers.chunks_mut(work * groups));
        for ((w, weight), numbers) in chunks {
            scope.spawn(move || {
                let rows = w.chunks_exact(width).zip(weight.chunks_exact_mut(packed));
                for ((w, weight), numbers) in rows.zip(numbers.chunks_exact_mut(groups)) {
                    let w = float.to_f32(w);
                    let groups = w.chunks_exact(group_size);
                    let packed = weight.chunks_exact_mut(group_size * bits / 8);
                    for ((w, weight), numbers) in groups.zip(packed).zip(numbers) {
                        *numbers = group(w, bits, weight);
                    }
                }
            });
        }
    });
    let shaped = |last| w.shape_with_last(last);
    let [scales, biases] = [0, 1].map(|which| numbers.iter().map(move |n| n[which]).collect());
    let array = |numbers: Vec<f32>, shape| Array::new(w.dtype, shape, bytes(w.dtype, &numbers)?);
    Ok(Quantized {
        weight: Array::new(Dtype::U32, shaped(columns * bits / 32), weight)?,
        scales: array(scales, shaped(groups))?,
        biases: Some(array(biases, shaped(groups))?),
    })
}

/// One group: writes its codes; -> scale and bias
fn group(w: &[f32], bits: usize, packed: &mut [u8]) -> [f32; 2] {
    let levels = ((1u32 << bits) - 1) as f32;
    let low = w.iter().copied().fold(f32::INFINITY, f32::min);
    let high = w.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    // The end with the larger magnitude becomes the bias, and zero falls on a level exactly.
    let from_low = low.abs() > high.abs();
    let step = ((high - low) / levels).max(SMALLEST);
    let mut scale = if from_low { step } else { -step };
    let edge = if from_low { low } else { high };
    let steps = (edge / scale).round_ties_even();
    let mut bias = 0.0;
    if steps != 0.0 {
        scale = edge / steps;
        bias = edge;
    }
    let code = |w: f32| ((w - bias) / scale).round_ties_even().clamp(0.0, levels) as u64;
    // Eight codes are `bits` bytes.
    for (eight, packed) in w.chunks_exact(8).zip(packed.chunks_exact_mut(bits)) {
        let word = eight.iter().rev().fold(0u64, |word, w| word << bits | code(*w));
        packed.copy_from_slice(&word.to_le_bytes()[..bits]);
    }
    [scale, bias]
}

/// The rows of a quantized matrix as floats.
struct Rows<'a> {
    weight: &'a [u8],
    scales: Vec<f32>,
    biases: Vec<f32>,
    layout: Quantization,
    count: usize,
    columns: usize,
}

impl<'a> Rows<'a> {
    fn new(matrix: &'a Quantized, layout: Quantization) -> Result<Self> {
        let (count, columns) = unpacked(matrix, layout);
        Ok(Self {
            weight: &matrix.weight.bytes,
            scales: numbers(&matrix.scales)?,
            biases: matrix.biases.as_ref().map(numbers).transpose()?.unwrap_or_default(),
            layout,
            count,
            columns,
        })
    }

    fn row(&self, n: usize, out: &mut [f32]) {
        let Quantization { group_size, bits } = self.layout;
        let (packed, groups) = (self.columns * bits / 8, self.columns / group_size);
        let mut unpacked = vec![0; self.columns];
        codes::unpack(&self.weight[n * packed..][..packed], bits, &mut unpacked);
        let numbers = self.scales[n * groups..].iter().zip(&self.biases[n * groups..]);
        let chunks = out.chunks_exact_mut(group_size).zip(unpacked.chunks_exact(group_size));
        for ((out, codes), (scale, bias)) in chunks.zip(numbers) {
            out.iter_mut().zip(codes).for_each(|(w, code)| *w = scale * f32::from(*code) + bias);
        }
    }
}

pub fn dequantize(matrix: &Quantized, layout: Quantization, threads: usize) -> Result<Array> {
    let rows = Rows::new(matrix, layout)?;
    let mut out = vec![0.0; rows.count * rows.columns];
    spread(&mut out, rows.columns, threads, |n, out| rows.row(n, out));
    let shape = matrix.scales.shape_with_last(rows.columns);
    let dtype = matrix.scales.dtype;
    Array::new(dtype, shape, bytes(dtype, &out)?)
}

pub fn matmul(
    x: &Array,
    matrix: &Quantized,
    transpose: bool,
    layout: Quantization,
    threads: usize,
) -> Result<Array> {
    let rows = Rows::new(matrix, layout)?;
    let (inputs, outputs) =
        if transpose { (rows.columns, rows.count) } else { (rows.count, rows.columns) };
    let xs = numbers(x)?;
    let count = xs.len().checked_div(inputs).unwrap_or(0);
    let mut y = vec![0.0; count * outputs];
    match transpose {
        // Row n of the matrix makes column n of y: a row of this, transposed afterwards.
        true => {
            let mut transposed = vec![0.0; count * outputs];
            spread(&mut transposed, count, threads, |n, out| {
                let mut row = vec![0.0; inputs];
                rows.row(n, &mut row);
                let dots = xs.chunks_exact(inputs).map(|x| dot(x, &row));
                out.iter_mut().zip(dots).for_each(|(y, dot)| *y = dot);
            });
            for (place, y) in y.iter_mut().enumerate() {
                *y = transposed[place % outputs * count + place / outputs];
            }
        }
        false => {
            let mut dense = vec![0.0; inputs * outputs];
            spread(&mut dense, outputs, threads, |n, out| rows.row(n, out));
            spread(&mut y, outputs, threads, |n, y| {
                for (x, row) in xs[n * inputs..][..inputs].iter().zip(dense.chunks_exact(outputs)) {
                    y.iter_mut().zip(row).for_each(|(y, w)| *y += x * w);
                }
            });
        }
    }
    Array::new(x.dtype, x.shape_with_last(outputs), bytes(x.dtype, &y)?)
}

/// Sums of sixteen places each, so that a long row adds up few roundings.
fn dot(x: &[f32], y: &[f32]) -> f32 {
    let mut sums = [0.0f32; 16];
    let (xs, ys) = (x.chunks_exact(16), y.chunks_exact(16));
    for (x, y) in xs.zip(ys) {
        for place in 0..16 {
            sums[place] += x[place] * y[place];
        }
    }
    sums.iter().sum()
}

/// Calls `work` for every row of `out` with its number, on some threads.
fn spread(out: &mut [f32], width: usize, threads: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
    let rows = out.len().checked_div(width).unwrap_or(0);
    if rows == 0 {
        return;
    }
    let each = rows.div_ceil(threads.max(1));
    let work = &work;
    std::thread::scope(|scope| {
        for (chunk, out) in out.chunks_mut(each * width).enumerate() {
            scope.spawn(move || {
                for (row, out) in out.chunks_exact_mut(width).enumerate() {
                    work(chunk * each + row, out);
                }
            });
        }
    });
}
