//! The operations beside their definitions in f64, on every level of this machine, through the
//! files that they are read from.

mod attention;
mod lora;
mod products;
mod rows;

use super::float::Float;
use super::*;
use crate::backend::QuantizedWeights;
use crate::files::safetensors::TensorFiles;
use crate::spec::Quantization;
use proptest::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::TensorView as Data;

/// Numbers from a seed, in -1..1.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> f32 {
        // xorshift64 (Marsaglia, 2003)
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn take(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.next()).collect()
    }
}

fn bytes(values: &[f32], dtype: Dtype) -> Vec<u8> {
    let of = |x: &f32| match dtype {
        Dtype::F32 => x.to_le_bytes().to_vec(),
        Dtype::F16 => half::f16::from_f32(*x).to_le_bytes().to_vec(),
        _ => half::bf16::from_f32(*x).to_le_bytes().to_vec(),
    };
    values.iter().flat_map(of).collect()
}

/// What the checkpoint then holds.
fn rounded(values: &[f32], dtype: Dtype) -> Vec<f64> {
    Float::of(dtype).unwrap().to_f32(&bytes(values, dtype)).into_iter().map(f64::from).collect()
}

fn pack(codes: &[u8], bits: usize) -> Vec<u8> {
    let mut packed = vec![0u8; codes.len() * bits / 8];
    for (place, &code) in codes.iter().enumerate() {
        for bit in (0..bits).filter(|bit| code >> bit & 1 == 1) {
            packed[(place * bits + bit) / 8] |= 1 << ((place * bits + bit) % 8);
        }
    }
    packed
}

/// A file of its own for tensors of a name, a dtype, a shape and bytes.
fn write(tensors: &[(&str, Dtype, Vec<usize>, Vec<u8>)]) -> (tempfile::TempDir, TensorFiles) {
    let folder = tempfile::tempdir().unwrap();
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (*name, Data::new(*dtype, shape.clone(), bytes).unwrap())
    });
    let path = folder.path().join("model.safetensors");
    let mut file = safetensors::serialize(views, None).unwrap();
    // One more space behind the header: the tensors are aligned to nothing.
    let header = u64::from_le_bytes(file[..8].try_into().unwrap()) + 1;
    file[..8].copy_from_slice(&header.to_le_bytes());
    file.insert(7 + header as usize, b' ');
    std::fs::write(&path, file).unwrap();
    let files = TensorFiles::open_one(&path).unwrap();
    (folder, files)
}

fn cpus() -> Vec<Cpu> {
    let levels = Level::all().into_iter();
    levels.map(|level| Cpu::new(Options { threads: 2, level }).unwrap()).collect()
}

fn tensor(cpu: &Cpu, rows: usize, values: &[f32]) -> Tensor {
    let width = values.len() / rows;
    cpu.map(rows, width, |row, out| out.copy_from_slice(&values[row * width..][..width]))
}

/// What a number may be off by.
#[derive(Clone, Copy)]
struct Exact {
    value: f64,
    error: f64,
}

fn check(level: Level, found: &[f32], exact: &[Exact]) {
    assert_eq!(found.len(), exact.len());
    for (place, (&found, &Exact { value, error })) in found.iter().zip(exact).enumerate() {
        let off = (f64::from(found) - value).abs();
        assert!(off <= error, "{level:?} {place}: {found}, not {value}: off {off}, not {error}");
    }
}

fn floats() -> impl Strategy<Value = Dtype> {
    prop::sample::select(vec![Dtype::F32, Dtype::F16, Dtype::BF16])
}

#[test]
fn nan_stays_nan() {
    let w = vec![1.0; 4 * 64];
    let (_folder, files) = write(&[
        ("w", Dtype::U32, vec![4, 8], vec![0x57; 4 * 32]),
        ("s", Dtype::BF16, vec![4, 1], bytes(&w[..4], Dtype::BF16)),
    ]);
    let scales = || files.require("s").unwrap();
    let weights = LinearWeights {
        weight: files.require("w").unwrap(),
        quantized: Some(QuantizedWeights {
            scales: scales(),
            biases: scales(),
            layout: Quantization { group_size: 64, bits: 4 },
        }),
        bias: None,
        out_features: 4,
    };
    for cpu in cpus() {
        let linear = cpu.linear(std::slice::from_ref(&weights)).unwrap();
        for rows in [1, 6, 20] {
            for broken in [f32::NAN, f32::INFINITY] {
                let mut x = vec![1.0; rows * 64];
                x[5] = broken;
                let y = cpu.project(&linear, &tensor(&cpu, rows, &x), &[]).unwrap();
                assert!(y[0].row(0).iter().all(|y| !y.is_finite()), "{:?} {rows}", cpu.level);
                assert!((1..rows).all(|row| y[0].row(row).iter().all(|y| y.is_finite())));
            }
        }
        let gate = tensor(&cpu, 1, &[f32::NAN, 200.0, -200.0, 0.0]);
        let swiglu = cpu.glu(&gate, &tensor(&cpu, 1, &[1.0; 4]), Activation::Silu).unwrap();
        let swiglu = swiglu.row(0);
        assert!(swiglu[0].is_nan() && swiglu[1] == 200.0);
        assert!(swiglu[2].abs() < 1e-30 && swiglu[3] == 0.0);
        let gelu = cpu.glu(&gate, &tensor(&cpu, 1, &[1.0; 4]), Activation::Gelu).unwrap();
        let gelu = gelu.row(0);
        assert!(gelu[0].is_nan() && gelu[1] == 200.0);
        assert!(gelu[2].abs() < 1e-30 && gelu[3] == 0.0);
    }
}
