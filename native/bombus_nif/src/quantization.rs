//! Matrices of a caller's own: quantized, dequantized, multiplied.

use crate::answer::answer_later;
use crate::model::DeviceOption;
use bombus::error::{Error, Result};
use bombus::files::safetensors::dtype;
use bombus::quant::{Array, Mode, Quantized, Scheme};
use bombus::quantization::{dequantize, matmul, quantize};
use bombus::spec::Quantization;
use rustler::{Binary, Env, NewBinary, NifMap, NifUnitEnum, OwnedEnv, Term};

#[derive(NifUnitEnum)]
enum Operation {
    Quantize,
    Dequantize,
    Matmul,
}

#[derive(NifUnitEnum)]
enum ModeOption {
    Affine,
    Mxfp4,
    Mxfp8,
    Nvfp4,
}

#[derive(NifMap)]
struct Options {
    device: DeviceOption,
    mode: ModeOption,
    group_size: usize,
    bits: usize,
    transpose: bool,
}

/// Takes and answers arrays as `{dtype, shape, binary}`:
/// `{reference, {:ok, arrays} | {:error, {reason, message}}}`.
#[rustler::nif]
fn quantization<'a>(
    env: Env<'a>,
    operation: Operation,
    arrays: Term<'a>,
    options: Options,
    reference: Term<'a>,
) -> Term<'a> {
    // Large binaries are shared with the caller until they are copied on the other thread.
    let own = OwnedEnv::new();
    let arrays = own.save(arrays);
    let work = move || {
        let arrays = own.run(|env| decode(arrays.load(env)))?;
        Ok(Arrays(run(&operation, arrays, &options)?))
    };
    answer_later(env, reference, work)
}

fn run(operation: &Operation, arrays: Vec<Array>, options: &Options) -> Result<Vec<Array>> {
    let mode = match options.mode {
        ModeOption::Affine => Mode::Affine,
        ModeOption::Mxfp4 => Mode::Mxfp4,
        ModeOption::Mxfp8 => Mode::Mxfp8,
        ModeOption::Nvfp4 => Mode::Nvfp4,
    };
    let layout = Quantization { group_size: options.group_size, bits: options.bits };
    let scheme = Scheme { mode, layout };
    let device = options.device.device(None)?;
    match operation {
        Operation::Quantize => {
            let [w] = exactly(arrays)?;
            let Quantized { weight, scales, biases } = quantize(device, &w, scheme)?;
            Ok([weight, scales].into_iter().chain(biases).collect())
        }
        Operation::Dequantize => {
            let matrix = matrix(arrays)?;
            Ok(vec![dequantize(device, &matrix, scheme)?])
        }
        Operation::Matmul => {
            let mut arrays = arrays;
            let x = arrays.drain(..1.min(arrays.len())).collect();
            let [x] = exactly(x)?;
            let matrix = matrix(arrays)?;
            Ok(vec![matmul(device, &x, &matrix, options.transpose, scheme)?])
        }
    }
}

/// A weight, its scales, and biases where the mode has some.
fn matrix(mut arrays: Vec<Array>) -> Result<Quantized> {
    let biases = if arrays.len() == 3 { arrays.pop() } else { None };
    let [weight, scales] = exactly(arrays)?;
    Ok(Quantized { weight, scales, biases })
}

fn exactly<const N: usize>(arrays: Vec<Array>) -> Result<[Array; N]> {
    let count = arrays.len();
    let wrong = |_| Error::Request(format!("expected {N} arrays, got {count}"));
    arrays.try_into().map_err(wrong)
}

fn decode(arrays: Term) -> Result<Vec<Array>> {
    let wrong = |_| Error::Request("expected arrays as {dtype, shape, binary}".into());
    let arrays: Vec<(String, Vec<usize>, Binary)> = arrays.decode().map_err(wrong)?;
    let array = |(name, shape, binary): (String, Vec<usize>, Binary)| {
        Array::new(dtype(&name)?, shape, binary.as_slice().to_vec())
    };
    arrays.into_iter().map(array).collect()
}

struct Arrays(Vec<Array>);

impl rustler::Encoder for Arrays {
    fn encode<'a>(&self, env: Env<'a>) -> Term<'a> {
        let term = |array: &Array| {
            let mut binary = NewBinary::new(env, array.bytes.len());
            binary.as_mut_slice().copy_from_slice(&array.bytes);
            (array.dtype.to_string(), array.shape.clone(), Binary::from(binary))
        };
        self.0.iter().map(term).collect::<Vec<_>>().encode(env)
    }
}
