//! Adapters as the kernel for steps takes them.

use crate::backend::BoundAdapter;
use crate::backend::arrays;
use crate::backend::cuda::{Addresses, Packed, on_card};
use crate::backend::mlx::Mlx;
use crate::error::Result;
use mlx_rs::{Array, ops, transforms};
use std::cell::RefCell;
use std::rc::Rc;

/// The tables of the adapters in use: address, and highest rank.
pub struct AdapterTables {
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

impl AdapterTables {
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
                Some(pair) => words.extend(pair.words(&self.addresses)?),
                None => words.push(Array::from_slice(&[0u64; 3], &[3])),
            }
        }
        let words = on_card(&ops::concatenate(&words, 0)?)?;
        let address = self.addresses.of(&words)?;
        transforms::eval([&address])?;
        let address = arrays::values::<u64>(&address)?[0];
        let rank = pairs.iter().flatten().map(|pair| pair.rank).max().unwrap_or(0);
        Ok(Table { pairs, _words: words, address, rank })
    }
}
