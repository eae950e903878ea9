//! LoRA A and B as the kernel for steps takes them.

use super::layout::MOST_RANK;
use super::pages::Addresses;
use super::{arrays, on_card};
use crate::error::Result;
use mlx_rs::{Array, Dtype, ops};
use std::rc::Rc;

/// LoRA A and B of one linear layer: a `[in, rank]`, b `[out, rank]`; both in bfloat16, with zeros to a rank that
/// is a multiple of eight.
pub struct Packed {
    a: Array,
    b: Array,
    pub rank: usize,
    scale: f32,
}

impl Packed {
    /// a: `[in, rank]`, b: `[rank, out]`; none where the kernel does not take it.
    pub fn new(a: &Array, b: &Array, scale: f32) -> Result<Option<Rc<Self>>> {
        let rank = a.dim(1);
        if !(1..=MOST_RANK as i32).contains(&rank) {
            return Ok(None);
        }
        // The kernel adds up x a^T in integers, which know no NaN.
        let broken = ops::is_nan(a.multiply(Array::from_f32(0.0))?.sum(false)?)?;
        broken.eval()?;
        if arrays::values::<bool>(&broken)?[0] {
            return Ok(None);
        }
        let more = (8 - rank % 8) % 8;
        let filled = |x: &Array| {
            let x = ops::pad(x, &[(0, 0), (0, more)], None, None)?;
            on_card(&x.as_dtype(Dtype::Bfloat16)?.flatten(None, None)?)
        };
        let (a, b, rank) = (filled(a)?, filled(&b.t())?, rank + more);
        Ok(Some(Rc::new(Self { a, b, rank: rank as usize, scale })))
    }
}

impl Packed {
    /// What the kernel finds in an adapter's table: where a and b are, rank and scale.
    pub fn words(&self, addresses: &Addresses) -> Result<[Array; 3]> {
        let rank = self.rank as u64 | u64::from(self.scale.to_bits()) << 32;
        let rank = Array::from_slice(&[rank], &[1]);
        Ok([addresses.of(&self.a)?, addresses.of(&self.b)?, rank])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_holds_nan_is_not_for_the_kernel() {
        arrays::tests::on_cpu(|| {
            for (number, serves) in [(1.0, true), (f32::NAN, false), (f32::INFINITY, false)] {
                let a = Array::from_slice(&[0.5, number], &[1, 2]);
                let b = Array::from_slice(&[0.5f32; 4], &[2, 2]);
                assert_eq!(Packed::new(&a, &b, 1.0).unwrap().is_some(), serves, "{number}");
            }
        });
    }

    #[test]
    fn ranks_are_filled_up_to_a_multiple_of_eight() {
        arrays::tests::on_cpu(|| {
            let (inputs, rank, outputs) = (16, 11, 4);
            let numbers = |rows: usize, columns: usize| {
                let numbers: Vec<f32> = (0..rows * columns).map(|number| number as f32).collect();
                Array::from_slice(&numbers, &[rows as i32, columns as i32])
            };
            let lora = Packed::new(&numbers(inputs, rank), &numbers(rank, outputs), 2.0);
            let lora = lora.unwrap().unwrap();
            let read = |x: &Array| {
                let x = x.as_dtype(Dtype::Float32).unwrap();
                x.eval().unwrap();
                arrays::values::<f32>(&x).unwrap()
            };
            let (a, b) = (read(&lora.a), read(&lora.b));
            assert_eq!((lora.rank, a.len(), b.len()), (16, 16 * inputs, outputs * 16));
            for r in 0..16 {
                for input in 0..inputs {
                    let expected = if r < rank { (input * rank + r) as f32 } else { 0.0 };
                    assert_eq!(a[input * 16 + r], expected, "a {r} {input}");
                }
                for output in 0..outputs {
                    let expected = if r < rank { (r * outputs + output) as f32 } else { 0.0 };
                    assert_eq!(b[output * 16 + r], expected, "b {output} {r}");
                }
            }
        });
    }
}
