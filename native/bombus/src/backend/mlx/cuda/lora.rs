//! Adapters as the kernel for steps wants them.

use super::pages::Addresses;
use super::step::MOST_RANK;
use super::{Mlx, array, on_card};
use crate::decoder::BoundAdapter;
use crate::error::Result;
use mlx_rs::{Array, Dtype, ops, transforms};
use std::cell::RefCell;
use std::rc::Rc;

/// A pair for one linear layer: a `[in, rank]`, b `[out, rank]`; both in bfloat16, with zeros to a rank that
/// is a multiple of eight.
pub struct Packed {
    a: Array,
    b: Array,
    rank: usize,
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
        if array::values::<bool>(&broken)?[0] {
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

/// The tables of the adapters in use: address, and highest rank.
pub struct Tables {
    addresses: Rc<Addresses>,
    known: RefCell<Vec<Table>>,
}

struct Table {
    /// They keep what the table points to, and name the adapter.
    pairs: Vec<Option<Rc<Packed>>>,
    _words: Array,
    address: u64,
    rank: usize,
}

impl Tables {
    pub fn new(addresses: Rc<Addresses>) -> Self {
        Self { addresses, known: RefCell::default() }
    }

    /// None where the kernel does not serve this adapter: DoRA, or what it adds to embedding or head.
    pub fn of(&self, adapter: &BoundAdapter<Mlx>) -> Result<Option<(u64, usize)>> {
        if adapter.embed_tokens.is_some() || adapter.lm_head.is_some() {
            return Ok(None);
        }
        let loras = || adapter.layers.iter().flatten().flatten();
        if loras().flatten().any(|lora| lora.packed.is_none()) {
            return Ok(None);
        }
        // This is asked for every row of every step.
        let pairs = || loras().map(|lora| lora.as_ref()?.packed.as_ref());
        let same = |table: &Table| {
            let known = table.pairs.iter().map(|pair| pair.as_ref().map(Rc::as_ptr));
            known.eq(pairs().map(|pair| pair.map(Rc::as_ptr)))
        };
        if let Some(table) = self.known.borrow().iter().find(|table| same(table)) {
            return Ok(Some((table.address, table.rank)));
        }
        let table = self.make(pairs().map(Option::<&_>::cloned).collect())?;
        // Those that nobody else has any more go, now that no step is in flight that may have them.
        let used =
            |table: &Table| table.pairs.iter().flatten().any(|pair| Rc::strong_count(pair) > 1);
        self.known.borrow_mut().retain(used);
        let found = (table.address, table.rank);
        self.known.borrow_mut().push(table);
        Ok(Some(found))
    }

    fn make(&self, pairs: Vec<Option<Rc<Packed>>>) -> Result<Table> {
        let mut words = vec![];
        for pair in &pairs {
            match pair {
                Some(pair) => {
                    let rank = pair.rank as u64 | u64::from(pair.scale.to_bits()) << 32;
                    let rank = Array::from_slice(&[rank], &[1]);
                    words.extend([self.addresses.of(&pair.a)?, self.addresses.of(&pair.b)?, rank]);
                }
                None => words.push(Array::from_slice(&[0u64; 3], &[3])),
            }
        }
        let words = on_card(&ops::concatenate(&words, 0)?)?;
        let address = self.addresses.of(&words)?;
        transforms::eval([&address])?;
        let address = array::values::<u64>(&address)?[0];
        let rank = pairs.iter().flatten().map(|pair| pair.rank).max().unwrap_or(0);
        Ok(Table { pairs, _words: words, address, rank })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Backend;
    use crate::backend::mlx::Device;

    #[test]
    fn a_pair_without_numbers_is_not_for_the_kernel() {
        Mlx::new(Device::Cpu).unwrap().scope(|| {
            for (number, serves) in [(1.0, true), (f32::NAN, false), (f32::INFINITY, false)] {
                let a = Array::from_slice(&[0.5, number], &[1, 2]);
                let b = Array::from_slice(&[0.5f32; 4], &[2, 2]);
                assert_eq!(Packed::new(&a, &b, 1.0).unwrap().is_some(), serves, "{number}");
            }
        });
    }

    #[test]
    fn pairs_are_filled_up_to_a_multiple_of_eight() {
        Mlx::new(Device::Cpu).unwrap().scope(|| {
            let (inputs, rank, outputs) = (16, 11, 4);
            let numbers = |rows: usize, columns: usize| {
                let numbers: Vec<f32> = (0..rows * columns).map(|number| number as f32).collect();
                Array::from_slice(&numbers, &[rows as i32, columns as i32])
            };
            let pair = Packed::new(&numbers(inputs, rank), &numbers(rank, outputs), 2.0);
            let pair = pair.unwrap().unwrap();
            let read = |x: &Array| {
                let x = x.as_dtype(Dtype::Float32).unwrap();
                x.eval().unwrap();
                array::values::<f32>(&x).unwrap()
            };
            let (a, b) = (read(&pair.a), read(&pair.b));
            assert_eq!((pair.rank, a.len(), b.len()), (16, 16 * inputs, outputs * 16));
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
