//! A model on an NVIDIA card: tokens of single rows in one launch for all layers, where the kernel
//! for that serves the model, and everything else layer by layer.

use super::Executor;
use super::adapter_tables::AdapterTables;
use super::program::{self, Program, Reason};
use crate::backend::cuda::launches::{self, LaunchGuard};
use crate::backend::cuda::{
    Addresses, MOST_ROWS, PagedAttention, Phase, Row, Step, TILE_ROWS, stacked,
};
use crate::backend::mlx::{Cache, Mlx, Samples, synchronize};
use crate::backend::{Backend, Batch, Entry, Token, arrays};
use crate::error::{Error, Result};
use crate::model::decoder::Decoder;
use crate::sampler::Draw;
use mlx_rs::{Array, Dtype, Stream, transforms};
use std::cell::RefCell;
use std::rc::Rc;

pub struct CudaExecutor {
    decoder: Decoder<Mlx>,
    fused: Result<Rc<Fused>, Reason>,
}

/// The kernel for steps, and what it needs of the model.
struct Fused {
    step: Step,
    attention: Rc<PagedAttention>,
    tables: AdapterTables,
    /// of the step that is being made
    launch: RefCell<Option<LaunchGuard>>,
}

/// What a step took of the card goes back with it, where no samples keep it: it may never be computed.
pub struct StepGuard(Option<Rc<Fused>>);

impl Drop for StepGuard {
    fn drop(&mut self) {
        if let Some(fused) = &self.0
            && fused.launch.take().is_some()
        {
            fused.step.forget_plan();
        }
    }
}

impl CudaExecutor {
    pub fn new(decoder: Decoder<Mlx>) -> Result<Self> {
        let fused = match Fused::new(&decoder) {
            Ok(fused) => fused.map(Rc::new),
            Err(error @ Error::OutOfMemory(_)) => return Err(error),
            Err(error) => Err(format!("the kernel failed: {error}")),
        };
        Ok(Self { decoder, fused })
    }

    /// How long the phases of the last step took, where the kernel made it.
    pub fn profile(&self) -> Result<Vec<Phase>> {
        self.fused.as_ref().map_or(Ok(vec![]), |fused| fused.step.profile())
    }
}

impl Executor for CudaExecutor {
    type Backend = Mlx;
    type Guard = StepGuard;

    fn decoder(&self) -> &Decoder<Mlx> {
        &self.decoder
    }

    fn guard(&self) -> StepGuard {
        StepGuard(self.fused.as_ref().ok().cloned())
    }

    fn cache(&self) -> Cache {
        match &self.fused {
            Ok(fused) => Cache::Paged(fused.attention.sequence()),
            Err(_) => self.decoder.cache(),
        }
    }

    fn forward(&self, batch: &mut Batch<Mlx>, previous: Option<&Samples>) -> Result<Array> {
        match &self.fused {
            Ok(fused) => fused.forward(&self.decoder, batch, previous),
            Err(_) => self.decoder.forward(batch, previous),
        }
    }

    fn sample(&self, logits: &Array, draws: &[Draw]) -> Result<Samples> {
        let mut samples = self.decoder.backend.sample(logits, draws)?;
        samples.launch = self.fused.as_ref().ok().and_then(|fused| fused.launch.take());
        Ok(samples)
    }

    fn fallback(&self) -> Option<&str> {
        self.fused.as_ref().err().map(String::as_str)
    }
}

impl Fused {
    /// The inner error: why the kernel does not serve this model, or this card.
    fn new(decoder: &Decoder<Mlx>) -> Result<Result<Self, Reason>> {
        let Program { shape, kinds, ropes } = match Program::compile(&decoder.spec) {
            Ok(program) => program,
            Err(reason) => return Ok(Err(reason)),
        };
        let addresses = Rc::new(Addresses::new()?);
        let attention = PagedAttention::new(shape, kinds.clone(), &ropes, addresses.clone())?;
        let attention = Rc::new(attention);
        let step = match program::arrays(decoder, &kinds, &attention.rotation) {
            Ok(arrays) => Step::new(&arrays, shape, &addresses)?,
            Err(reason) => return Ok(Err(reason)),
        };
        let tables = AdapterTables::new(addresses);
        let fused = Self { step, attention, tables, launch: RefCell::default() };
        Ok(match fused.works(decoder)? {
            true => Ok(fused),
            false => Err("the kernel does not compute on this card what MLX does".into()),
        })
    }

    /// Tries each of the kernel's forms (which also compiles them), beside MLX's own operations.
    fn works(&self, decoder: &Decoder<Mlx>) -> Result<bool> {
        let mut cache = decoder.cache();
        let theirs = decoder.forward(&mut first_tokens(std::slice::from_mut(&mut cache)), None)?;
        let theirs = theirs.as_dtype(Dtype::Float32)?;
        let size = theirs.abs()?.mean(false)?;
        for rows in [1, TILE_ROWS + 1] {
            let sequence = |_| Cache::Paged(self.attention.sequence());
            let mut caches: Vec<_> = (0..rows).map(sequence).collect();
            let own = self.step(&mut first_tokens(&mut caches), None)?;
            let off = own.subtract(&theirs)?.abs()?.mean(false)?;
            // MLX rounds to bfloat16 between layers, the kernel does not.
            let close = off.lt(size.multiply(Array::from_f32(0.1))?)?;
            close.eval()?;
            drop(self.launch.take());
            if !arrays::values::<bool>(&close)?[0] {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether the kernel takes these rows of a step.
    fn serves(&self, entry: &Entry<Mlx>, outputs: &[usize]) -> Result<bool> {
        let rows = &entry.segment.rows;
        let single = rows.len() == 1 && outputs.contains(&rows.start);
        Ok(single
            && match entry.adapter {
                Some(adapter) => self.tables.of(adapter)?.is_some(),
                None => true,
            })
    }

    fn forward(
        &self,
        decoder: &Decoder<Mlx>,
        batch: &mut Batch<Mlx>,
        previous: Option<&Samples>,
    ) -> Result<Array> {
        let serves = batch.entries.iter().map(|entry| self.serves(entry, &batch.outputs));
        let serves: Vec<bool> = serves.collect::<Result<_>>()?;
        if !serves.contains(&true) {
            return decoder.forward(batch, previous);
        }
        let (mut single, mut rest, places) = split(batch, &serves);
        let logits = self.step(&mut single, previous)?;
        if rest.entries.is_empty() {
            return Ok(logits);
        }
        let others = decoder.forward(&mut rest, previous)?.as_dtype(Dtype::Float32)?;
        decoder.backend.gather_rows(&stacked(&[logits, others])?, &places)
    }

    /// The logits `[rows, vocab]` of single rows; more than the kernel takes go in several launches.
    fn step(&self, batch: &mut Batch<Mlx>, previous: Option<&Samples>) -> Result<Array> {
        let mut rows = vec![];
        for (token, entry) in batch.tokens.iter().zip(&mut batch.entries) {
            let Cache::Paged(sequence) = &mut *entry.cache else {
                return Err(Error::Backend("a cache without pages".into()));
            };
            let adapter = match entry.adapter {
                Some(adapter) => self.tables.of(adapter)?,
                None => None,
            };
            rows.push(Row { token: *token, position: entry.segment.start, sequence, adapter });
        }
        let finish = || synchronize(&Stream::thread_local_or_default());
        self.launch.replace(Some(launches::take(std::ptr::from_ref(self) as usize, finish)?));
        let mut logits = vec![];
        for rows in rows.chunks_mut(MOST_ROWS) {
            // Two launches at once would wait for each other's blocks for ever.
            if let Some(before) = logits.last() {
                transforms::async_eval([before])?;
            }
            logits.push(self.step.run(rows, previous.map(|samples| &samples.ids))?);
        }
        stacked(&logits)
    }
}

/// A step of token 1 as the first of each sequence.
fn first_tokens(caches: &mut [Cache]) -> Batch<'_, Mlx> {
    let mut batch = Batch::default();
    caches.iter_mut().for_each(|cache| batch.push(&[Token::Id(1)], 0, &[0], cache, None));
    batch
}

/// A batch's entries apart, and where the whole batch's outputs are among those of both.
fn split<'a>(
    batch: &'a mut Batch<Mlx>,
    serves: &[bool],
) -> (Batch<'a, Mlx>, Batch<'a, Mlx>, Vec<usize>) {
    let (mut single, mut rest) = (Batch::default(), Batch::default());
    let (mut of_single, mut of_rest) = (vec![], vec![]);
    for (entry, is_single) in batch.entries.iter_mut().zip(serves) {
        let (to, wanted) = match is_single {
            true => (&mut single, &mut of_single),
            false => (&mut rest, &mut of_rest),
        };
        let rows = entry.segment.rows.clone();
        let own: Vec<usize> =
            batch.outputs.iter().copied().filter(|output| rows.contains(output)).collect();
        wanted.extend(&own);
        let own: Vec<usize> = own.into_iter().map(|output| output - rows.start).collect();
        to.push(&batch.tokens[rows], entry.segment.start, &own, entry.cache, entry.adapter);
    }
    // Where each wanted row is among both.
    let mut places: Vec<(usize, usize)> = of_single.into_iter().chain(of_rest).zip(0..).collect();
    places.sort_unstable();
    (single, rest, places.into_iter().map(|(_, place)| place).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::mlx::Device;

    #[test]
    fn outputs_of_a_batch_that_is_split_keep_their_order() {
        let mlx = Mlx::new(Device::Cpu).unwrap();
        let mut caches: Vec<Cache> = (0..4).map(|_| mlx.cache(1)).collect();
        let mut batch = Batch::default();
        let ids = |ids: &[u32]| ids.iter().map(|id| Token::Id(*id)).collect::<Vec<_>>();
        let rows: [&[u32]; 4] = [&[1, 2], &[3], &[4, 5, 6], &[7]];
        for (cache, rows) in caches.iter_mut().zip(rows) {
            batch.push(&ids(rows), 0, &[rows.len() - 1], cache, None);
        }
        assert_eq!(batch.outputs, [1, 2, 5, 6]);
        let (single, rest, places) = split(&mut batch, &[false, true, false, true]);
        assert_eq!((single.tokens, single.outputs), (ids(&[3, 7]), vec![0, 1]));
        assert_eq!((rest.tokens, rest.outputs), (ids(&[1, 2, 4, 5, 6]), vec![1, 4]));
        // Among the logits of 3, 7, 2 and 6 those of 2, 3, 6 and 7.
        assert_eq!(places, [2, 0, 3, 1]);
    }
}
