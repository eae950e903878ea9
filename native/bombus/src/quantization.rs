//! Matrices of one's own in MLX's affine format: quantized, dequantized, multiplied.
//!
//! A row's groups of `group_size` numbers each have a scale and a bias: `w = scale * code + bias`,
//! the codes of `bits` packed into u32 from the low bits on. Format: `mlx.core.quantize`.

use crate::backend::Device;
use crate::backend::cpu::quantize as cpu;
#[cfg(feature = "mlx")]
use crate::backend::mlx::quantize as mlx;
use crate::error::{Error, Result};
use crate::quant::{Array, Mode, Quantized, Scheme, unpacked};
use crate::spec::Quantization;
use safetensors::tensor::Dtype;

/// w: f32, f16 or bf16, `[..., columns]`; the scales get its type, where the mode is affine.
pub fn quantize(device: Device, w: &Array, scheme: Scheme) -> Result<Quantized> {
    scheme.check()?;
    let (rows, columns) = w.matrix();
    let group_size = scheme.layout.group_size;
    if w.shape.len() < 2 || w.bytes.is_empty() || !columns.is_multiple_of(group_size) {
        return Err(Error::Request(format!(
            "expected a matrix whose rows are groups of {group_size}, got one of shape {:?}",
            w.shape
        )));
    }
    match device {
        Device::Cpu(options) => {
            cpu::quantize(w, rows, columns, scheme.affine_layout()?, options.threads)
        }
        #[cfg(feature = "mlx")]
        Device::Mlx(device) => mlx::quantize(device, w, scheme),
    }
}

/// -> in the type of the scales, where the mode is affine; else in bf16
pub fn dequantize(device: Device, matrix: &Quantized, scheme: Scheme) -> Result<Array> {
    check_quantized(matrix, scheme)?;
    match device {
        Device::Cpu(options) => cpu::dequantize(matrix, scheme.affine_layout()?, options.threads),
        #[cfg(feature = "mlx")]
        Device::Mlx(device) => mlx::dequantize(device, matrix, scheme),
    }
}

/// `x W'`, where the matrix is `[out, in]` (`transpose`), or `x W`, where it is `[in, out]`;
/// x `[..., in]` of the scales' type, where the mode is affine.
pub fn matmul(
    device: Device,
    x: &Array,
    matrix: &Quantized,
    transpose: bool,
    scheme: Scheme,
) -> Result<Array> {
    check_quantized(matrix, scheme)?;
    let (rows, columns) = unpacked(matrix, scheme.layout);
    let inputs = if transpose { columns } else { rows };
    if matrix.weight.shape.len() != 2 || x.shape.last() != Some(&inputs) {
        return Err(Error::Request(format!(
            "expected rows of {inputs} for a matrix [{rows}, {columns}], got x of shape {:?}",
            x.shape
        )));
    }
    if scheme.mode == Mode::Affine && x.dtype != matrix.scales.dtype {
        let (x, scales) = (x.dtype, matrix.scales.dtype);
        return Err(Error::Request(format!("x is {x:?}, and the scales are {scales:?}")));
    }
    match device {
        Device::Cpu(options) => {
            cpu::matmul(x, matrix, transpose, scheme.affine_layout()?, options.threads)
        }
        #[cfg(feature = "mlx")]
        Device::Mlx(device) => mlx::matmul(device, x, matrix, transpose, scheme),
    }
}

fn check_quantized(matrix: &Quantized, scheme: Scheme) -> Result<()> {
    scheme.check()?;
    let Quantization { group_size, bits } = scheme.layout;
    let Quantized { weight, scales, biases } = matrix;
    let columns = scales.matrix().1.checked_mul(group_size * bits).map_or(0, |bits| bits / 32);
    let packed = scales.shape_with_last(columns);
    let whole = match (scheme.mode, biases) {
        (Mode::Affine, Some(biases)) => {
            matches!(scales.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
                && (&scales.shape, scales.dtype) == (&biases.shape, biases.dtype)
        }
        (Mode::Affine, None) => false,
        (_, biases) => scales.dtype == Dtype::U8 && biases.is_none(),
    };
    let fits = weight.dtype == Dtype::U32
        && weight.shape == packed
        && scales.shape.len() >= 2
        && !scales.bytes.is_empty();
    match whole && fits {
        true => Ok(()),
        false => {
            let shown = |array: &Array| format!("{:?} {:?}", array.dtype, array.shape);
            let biases = biases.as_ref().map_or("none".into(), shown);
            let (weight, scales) = (shown(weight), shown(scales));
            Err(Error::Request(format!(
                "weight {weight}, scales {scales} and biases {biases} do not fit together: {scheme:?}"
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LAYOUTS: [(usize, usize); 7] =
        [(2, 32), (3, 64), (4, 64), (4, 128), (5, 32), (6, 128), (8, 64)];

    fn cpu() -> Device {
        Device::Cpu(crate::backend::cpu::Options { threads: 2, ..Default::default() })
    }

    fn array(dtype: Dtype, shape: &[usize], numbers: &[f32]) -> Array {
        let bytes = cpu::bytes(dtype, numbers).unwrap();
        Array::new(dtype, shape.to_vec(), bytes).unwrap()
    }

    fn numbers(array: &Array) -> Vec<f32> {
        cpu::numbers(array).unwrap()
    }

    fn some(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        (0..count)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1u32 << 23) as f32 - 1.0
            })
            .collect()
    }

    proptest! {
        #[test]
        fn what_is_quantized_comes_back_within_half_a_step(
            layout in prop::sample::select(LAYOUTS.to_vec()),
            seed in any::<u32>(),
            size in 0.001f32..100.0,
        ) {
            let (bits, group_size) = layout;
            let layout = Scheme::affine(Quantization { group_size, bits });
            let w: Vec<f32> = some(3 * 2 * group_size, seed).iter().map(|w| w * size).collect();
            let matrix = array(Dtype::F32, &[3, 2 * group_size], &w);
            let quantized = quantize(cpu(), &matrix, layout).unwrap();
            let back = numbers(&dequantize(cpu(), &quantized, layout).unwrap());
            let scales = numbers(&quantized.scales);
            for (place, (one, other)) in w.iter().zip(back).enumerate() {
                // The end that is no multiple of the scale may be a whole step away.
                prop_assert!((one - other).abs() <= scales[place / group_size].abs() * 1.001);
            }
        }
    }

    #[test]
    fn products_are_those_of_what_comes_back() {
        // Rounded once, at the end.
        for (dtype, rounding) in [(Dtype::F32, 0.0), (Dtype::F16, 1e-3), (Dtype::BF16, 8e-3)] {
            for (layout, transpose) in LAYOUTS.into_iter().flat_map(|l| [(l, true), (l, false)]) {
                let (bits, group_size) = layout;
                let layout = Scheme::affine(Quantization { group_size, bits });
                let (outs, ins) = (5, 2 * group_size);
                let w = array(Dtype::F32, &[outs, ins], &some(outs * ins, 1));
                let exact = quantize(cpu(), &w, layout).unwrap();
                let numbers_of = |a: &Array| array(dtype, &a.shape, &numbers(a));
                let quantized = Quantized {
                    weight: exact.weight.clone(),
                    scales: numbers_of(&exact.scales),
                    biases: exact.biases.as_ref().map(numbers_of),
                };
                let wide = |a: &Array| array(Dtype::F32, &a.shape, &numbers(a));
                let as_f32 = Quantized {
                    scales: wide(&quantized.scales),
                    biases: quantized.biases.as_ref().map(wide),
                    weight: exact.weight,
                };
                let dense = numbers(&dequantize(cpu(), &as_f32, layout).unwrap());
                let (inputs, outputs) = if transpose { (ins, outs) } else { (outs, ins) };
                let x = array(dtype, &[1, 3, inputs], &some(3 * inputs, 2));
                let y = matmul(cpu(), &x, &quantized, transpose, layout).unwrap();
                assert_eq!((y.dtype, &y.shape[..]), (dtype, &[1, 3, outputs][..]));
                let (x, y) = (numbers(&x), numbers(&y));
                for (place, y) in y.into_iter().enumerate() {
                    let (row, out) = (place / outputs, place % outputs);
                    let term = |n: usize| {
                        let at = if transpose { out * inputs + n } else { n * outputs + out };
                        f64::from(x[row * inputs + n]) * f64::from(dense[at])
                    };
                    let expected: f64 = (0..inputs).map(term).sum();
                    let distance = (f64::from(y) - expected).abs();
                    assert!(distance < 1e-5 + rounding * expected.abs(), "{dtype:?} {layout:?}");
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_told() {
        let layout = Scheme::affine(Quantization { group_size: 64, bits: 4 });
        let w = array(Dtype::F32, &[2, 96], &some(192, 1));
        assert!(matches!(quantize(cpu(), &w, layout), Err(Error::Request(_))));
        let w = array(Dtype::F32, &[2, 128], &some(256, 1));
        let seven = Scheme::affine(Quantization { group_size: 64, bits: 7 });
        assert!(matches!(quantize(cpu(), &w, seven), Err(Error::Request(_))));
        let quantized = quantize(cpu(), &w, layout).unwrap();
        let wrong = Quantized { biases: Some(w.clone()), ..quantized.clone() };
        assert!(matches!(dequantize(cpu(), &wrong, layout), Err(Error::Request(_))));
        let x = array(Dtype::F32, &[1, 64], &some(64, 1));
        assert!(matches!(matmul(cpu(), &x, &quantized, true, layout), Err(Error::Request(_))));
    }

    /// Quantized bit by bit; products in float32, since MLX's CPU device adds up 16-bit numbers in
    /// 16 bits.
    #[cfg(feature = "mlx")]
    #[test]
    fn the_cpu_does_as_mlx() {
        let mlx = Device::Mlx(crate::backend::mlx::Device::Cpu);
        let near = |[own, theirs]: [Array; 2]| {
            assert_eq!((own.dtype, &own.shape), (theirs.dtype, &theirs.shape));
            let pairs = numbers(&own).into_iter().zip(numbers(&theirs));
            assert!(pairs.map(|(own, theirs)| (own - theirs).abs()).fold(0.0, f32::max) < 1e-5);
        };
        for (bits, group_size) in LAYOUTS {
            let layout = Scheme::affine(Quantization { group_size, bits });
            let mut w = some(4 * 2 * group_size, 3);
            // A group of zeros, one of one number, and one without negative ones.
            w[..group_size].fill(0.0);
            w[group_size..2 * group_size].fill(0.37);
            w[2 * group_size..3 * group_size].iter_mut().for_each(|w| *w = w.abs());
            for dtype in [Dtype::F16, Dtype::BF16, Dtype::F32] {
                let w = array(dtype, &[4, 2 * group_size], &w);
                let [own, theirs] = [cpu(), mlx].map(|d| quantize(d, &w, layout).unwrap());
                assert_eq!(own, theirs, "{dtype:?} {layout:?}");
            }
            let w = array(Dtype::F32, &[4, 2 * group_size], &w);
            let quantized = quantize(cpu(), &w, layout).unwrap();
            near([cpu(), mlx].map(|device| dequantize(device, &quantized, layout).unwrap()));
            for (transpose, inputs) in [(true, 2 * group_size), (false, 4)] {
                let x = array(Dtype::F32, &[3, inputs], &some(3 * inputs, 4));
                near([cpu(), mlx].map(|d| matmul(d, &x, &quantized, transpose, layout).unwrap()));
            }
        }
    }

    /// Floats for codes: what comes back is within a step of what went in, and multiplies as that.
    #[cfg(feature = "mlx")]
    #[test]
    fn mlx_has_other_modes() {
        let mlx = Device::Mlx(crate::backend::mlx::Device::Cpu);
        let one = |dtype, n: usize| {
            let unit: Vec<f32> = (0..n * n).map(|at| f32::from(at % (n + 1) == 0)).collect();
            array(dtype, &[n, n], &unit)
        };
        for (mode, bits, group_size, step) in
            [(Mode::Mxfp4, 4, 32, 0.35), (Mode::Mxfp8, 8, 32, 0.05), (Mode::Nvfp4, 4, 16, 0.25)]
        {
            let scheme = Scheme { mode, layout: Quantization { group_size, bits } };
            let w = array(Dtype::BF16, &[3, 64], &some(192, 1));
            let quantized = quantize(mlx, &w, scheme).unwrap();
            assert_eq!(quantized.weight.shape, [3, 64 * bits / 32]);
            assert_eq!(quantized.scales.shape, [3, 64 / group_size]);
            assert_eq!((quantized.scales.dtype, &quantized.biases), (Dtype::U8, &None));
            let back = dequantize(mlx, &quantized, scheme).unwrap();
            assert_eq!((back.dtype, &back.shape), (Dtype::BF16, &w.shape));
            let pairs = numbers(&w).into_iter().zip(numbers(&back));
            let worst = pairs.map(|(one, other)| (one - other).abs()).fold(0.0, f32::max);
            assert!(0.0 < worst && worst < step, "{mode:?}: {worst}");
            let y = matmul(mlx, &one(Dtype::BF16, 3), &quantized, false, scheme).unwrap();
            assert_eq!(numbers(&y), numbers(&back), "{mode:?}");
            assert!(matches!(quantize(cpu(), &w, scheme), Err(Error::Unsupported(_))));
            let wrong = Scheme { mode, layout: Quantization { group_size: 64, bits } };
            assert!(matches!(quantize(mlx, &w, wrong), Err(Error::Request(_))));
        }
    }
}
