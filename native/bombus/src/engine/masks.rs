//! Which tokens the rows of a step may become, where grammars say so. That is worked out while the step
//! is computed: it depends on what came before.

use crate::engine::sequence::Chunk;
use crate::error::{Error, Result};
use crate::grammar::{Allowed, Constraint};
use crate::sampler::Draw;
use std::thread;

/// A row whose text keeps to a grammar.
pub struct Row {
    /// Which of the step's draws is its.
    draw: usize,
    id: u64,
    constraint: Constraint,
    withheld: Vec<u32>,
}

/// What each of these rows may become.
pub type Masks = Vec<(usize, u64, Result<Allowed>)>;

/// Those of a step's chunks that are at the end of what is given, and have a grammar.
pub fn rows(chunks: &[Chunk]) -> Vec<Row> {
    let row = |(draw, chunk): (usize, &Chunk)| {
        let constraint = chunk.constraint.clone()?;
        let withheld = chunk.draw.as_ref()?.withheld.clone();
        Some(Row { draw, id: chunk.id, constraint, withheld })
    };
    chunks.iter().enumerate().filter_map(row).collect()
}

/// `work`, and beside it the rows' masks.
pub fn beside<T>(work: impl FnOnce() -> T, rows: &[Row]) -> (T, Masks) {
    if rows.is_empty() {
        return (work(), vec![]);
    }
    thread::scope(|scope| {
        let builder = thread::Builder::new().name("bombus masks".into());
        match builder.spawn_scoped(scope, || compute(rows)) {
            Ok(masks) => (work(), masks.join().unwrap_or_else(|_| broken(rows))),
            Err(_no_thread) => (work(), compute(rows)),
        }
    })
}

fn compute(rows: &[Row]) -> Masks {
    let mask = |row: &Row| {
        let allowed = row.constraint.allowed(&row.withheld);
        (row.draw, row.id, allowed.and_then(some))
    };
    rows.iter().map(mask).collect()
}

fn some(allowed: Allowed) -> Result<Allowed> {
    match allowed.is_empty() {
        true => Err(Error::Request("format: no token of the vocabulary leads on from here".into())),
        false => Ok(allowed),
    }
}

fn broken(rows: &[Row]) -> Masks {
    let error = || Err(Error::Panic("the grammar's masks".into()));
    rows.iter().map(|row| (row.draw, row.id, error())).collect()
}

/// Gives the draws their masks; -> whose failed
pub fn put(masks: Masks, draws: &mut [Draw]) -> Vec<(u64, Error)> {
    let mut failed = vec![];
    for (draw, id, allowed) in masks {
        match (allowed, draws.get_mut(draw)) {
            (Ok(allowed), Some(draw)) => {
                draw.withheld.retain(|id| !allowed.has(*id));
                draw.allowed = Some(allowed);
            }
            (Err(error), _) => failed.push((id, error)),
            (Ok(_), None) => {}
        }
    }
    failed
}
