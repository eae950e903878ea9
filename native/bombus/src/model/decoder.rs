//! The transformer, written once for every backend.
//!
//! It interprets a `ModelSpec`. Fields are named as modules of the checkpoint:
//! `model.layers.0.self_attn.q_proj`.

use crate::backend::{Backend, Batch, BoundAdapter, Entry, KvCache, LoraRows, Page, Segment};
use crate::error::{Error, Result};
use crate::spec::{BlockNorms, HeadWeight, LayerSpec, ModelSpec, Projection};
use std::ops::Range;

pub struct Decoder<B: Backend> {
    pub spec: ModelSpec,
    pub backend: B,
    pub embed_tokens: B::Linear,
    pub layers: Vec<Layer<B>>,
    pub norm: B::Norm,
    /// None: the embedding is the head, if there is one
    pub lm_head: Option<B::Linear>,
}

pub struct Layer<B: Backend> {
    pub before_attention: Option<B::Norm>,
    pub qkv_proj: B::Linear,
    pub attention: B::Attention,
    pub o_proj: B::Linear,
    pub after_attention: Option<B::Norm>,
    pub before_mlp: Option<B::Norm>,
    pub gate_up_proj: B::Linear,
    pub down_proj: B::Linear,
    pub after_mlp: Option<B::Norm>,
}

impl<B: Backend> Layer<B> {
    pub fn projection(&self, projection: Projection) -> &B::Linear {
        match projection {
            Projection::Qkv => &self.qkv_proj,
            Projection::O => &self.o_proj,
            Projection::GateUp => &self.gate_up_proj,
            Projection::Down => &self.down_proj,
        }
    }
}

const NO_HEAD: &str = "the checkpoint has no `lm_head`: the model gives embeddings only";

/// Consecutive rows with one adapter.
type Span<'a, B> = (Range<usize>, &'a BoundAdapter<B>);

impl<B: Backend> Decoder<B> {
    /// What shares the first `positions` with `cache`.
    pub fn fork(&self, cache: &KvCache<B>, positions: usize) -> Result<KvCache<B>> {
        self.backend.fork(cache, positions)
    }

    /// Up to so many positions, with how many of them a text can go on: none where a layer has let go
    /// of what its window sees from there.
    pub fn resumable(&self, cache: &KvCache<B>, positions: usize) -> usize {
        let mut layers = self.spec.layers.iter().enumerate();
        let has = layers.all(|(index, layer)| {
            self.backend.kept_from(cache, index) <= layer.attention.first_seen(positions)
        });
        if has { positions } else { 0 }
    }

    /// Makes room for these positions.
    pub fn reserve(&self, cache: &mut KvCache<B>, positions: Range<usize>) -> Result<()> {
        let mut layers = self.layers.iter().enumerate();
        layers.try_for_each(|(index, layer)| {
            self.backend.reserve(&layer.attention, index, cache, positions.clone())
        })
    }

    pub fn pages(&self, cache: &KvCache<B>) -> Vec<Page> {
        self.backend.pages(cache)
    }

    /// The logits `[outputs, vocab]` of the rows that the batch names, layer by layer.
    pub fn forward(
        &self,
        batch: &mut Batch<B>,
        previous: Option<&B::Samples>,
    ) -> Result<B::Tensor> {
        let spans = spans(&batch.entries);
        let hidden = self.normed(batch, previous, &spans)?;
        self.logits(&hidden, &batch.outputs, &spans)
    }

    /// The hidden states `[outputs, hidden]` behind the last norm, of the rows that the batch names.
    pub fn hidden(&self, batch: &mut Batch<B>) -> Result<B::Tensor> {
        let spans = spans(&batch.entries);
        self.normed(batch, None, &spans)
    }

    fn normed(
        &self,
        batch: &mut Batch<B>,
        previous: Option<&B::Samples>,
        spans: &[Span<B>],
    ) -> Result<B::Tensor> {
        let Batch { tokens, entries, outputs } = batch;
        let loras = loras(spans, 0, Range::clone, |adapter| adapter.embed_tokens.as_ref());
        let mut hidden = self.backend.embed(&self.embed_tokens, tokens, previous, &loras)?;
        if self.spec.embedding_scale != 1.0 {
            hidden = self.backend.scale(hidden, self.spec.embedding_scale)?;
        }
        for (index, layer) in self.layers.iter().enumerate() {
            hidden = self.layer(index, layer, hidden, entries, spans)?;
        }
        let hidden = self.backend.gather_rows(&hidden, outputs)?;
        self.backend.normalize(&hidden, &self.norm, &self.spec.norm)
    }

    fn layer(
        &self,
        index: usize,
        layer: &Layer<B>,
        hidden: B::Tensor,
        entries: &mut [Entry<B>],
        spans: &[Span<B>],
    ) -> Result<B::Tensor> {
        let LayerSpec { norms: BlockNorms { spec: norm, .. }, residual_scale, parallel, .. } =
            &self.spec.layers[index];
        let normalize = |x: &B::Tensor, weight: &B::Norm| self.backend.normalize(x, weight, norm);
        let before = |weight: &Option<B::Norm>, x: &B::Tensor| {
            weight.as_ref().map(|weight| normalize(x, weight)).transpose()
        };
        let add = |to: &B::Tensor, x: B::Tensor, after: &Option<B::Norm>| {
            let x = match after {
                Some(weight) => normalize(&x, weight)?,
                None => x,
            };
            self.backend.add(to, &x, *residual_scale)
        };
        let normed = before(&layer.before_attention, &hidden)?;
        let x = normed.as_ref().unwrap_or(&hidden);
        let attended = self.attention(index, layer, x, entries, spans)?;
        if *parallel {
            let x = self.mlp(index, layer, x, spans)?;
            let hidden = add(&hidden, attended, &layer.after_attention)?;
            return add(&hidden, x, &layer.after_mlp);
        }
        let hidden = add(&hidden, attended, &layer.after_attention)?;
        let normed = before(&layer.before_mlp, &hidden)?;
        let x = self.mlp(index, layer, normed.as_ref().unwrap_or(&hidden), spans)?;
        add(&hidden, x, &layer.after_mlp)
    }

    /// x: `[rows, hidden]`, as what comes out
    fn attention(
        &self,
        index: usize,
        layer: &Layer<B>,
        x: &B::Tensor,
        entries: &mut [Entry<B>],
        spans: &[Span<B>],
    ) -> Result<B::Tensor> {
        let backend = &self.backend;
        let loras = |projections| layer_loras(index, projections, spans);
        let qkv = outputs(backend.project(&layer.qkv_proj, x, &loras(Projection::Qkv))?);
        let segments: Vec<Segment> = entries.iter().map(|entry| entry.segment.clone()).collect();
        let mut caches: Vec<_> = entries.iter_mut().map(|entry| &mut *entry.cache).collect();
        let x = backend.attention(&layer.attention, index, qkv, &segments, &mut caches)?;
        let [x] = outputs(backend.project(&layer.o_proj, &x, &loras(Projection::O))?);
        Ok(x)
    }

    /// x: `[rows, hidden]`, as what comes out
    fn mlp(
        &self,
        index: usize,
        layer: &Layer<B>,
        x: &B::Tensor,
        spans: &[Span<B>],
    ) -> Result<B::Tensor> {
        let backend = &self.backend;
        let loras = |projections| layer_loras(index, projections, spans);
        let [gate, up] =
            outputs(backend.project(&layer.gate_up_proj, x, &loras(Projection::GateUp))?);
        let x = backend.glu(&gate, &up, self.spec.layers[index].mlp.activation)?;
        let [x] = outputs(backend.project(&layer.down_proj, &x, &loras(Projection::Down))?);
        Ok(x)
    }

    /// x: `[outputs, hidden]`, the step's rows `outputs` behind the last norm
    fn logits(&self, x: &B::Tensor, outputs: &[usize], spans: &[Span<B>]) -> Result<B::Tensor> {
        let within = |row: usize| outputs.partition_point(|output| *output < row);
        let selected = |rows: &Range<usize>| within(rows.start)..within(rows.end);
        let loras = loras(spans, 0, selected, |adapter| adapter.lm_head.as_ref());
        let lm_head = match (&self.lm_head, self.spec.head.weight) {
            (Some(lm_head), _) => lm_head,
            (None, HeadWeight::Absent) => return Err(Error::Unsupported(NO_HEAD.into())),
            (None, _) => &self.embed_tokens,
        };
        let [mut logits] = self::outputs(self.backend.project(lm_head, x, &loras)?);
        if self.spec.head.scale != 1.0 {
            logits = self.backend.scale(logits, self.spec.head.scale)?;
        }
        match self.spec.head.softcap {
            Some(cap) => self.backend.softcap(logits, cap),
            None => Ok(logits),
        }
    }
}

/// Neighbours with the same adapter as one, so that it multiplies their rows at once.
fn spans<'a, B: Backend>(entries: &[Entry<'a, B>]) -> Vec<Span<'a, B>> {
    let mut spans: Vec<Span<'a, B>> = vec![];
    for entry in entries {
        let Some(adapter) = entry.adapter else { continue };
        let rows = entry.segment.rows.clone();
        match spans.last_mut() {
            Some((last, same)) if std::ptr::eq(*same, adapter) && last.end == rows.start => {
                last.end = rows.end;
            }
            _ => spans.push((rows, adapter)),
        }
    }
    spans
}

/// What the adapters of `spans` add to output `part`, over the rows that `rows` makes of theirs.
fn loras<'a, B: Backend>(
    spans: &[Span<'a, B>],
    part: usize,
    rows: impl Fn(&Range<usize>) -> Range<usize>,
    lora: impl Fn(&'a BoundAdapter<B>) -> Option<&'a B::Lora>,
) -> Vec<LoraRows<'a, B>> {
    let share = |(span, adapter): &Span<'a, B>| {
        let rows = rows(span);
        let lora = lora(adapter).filter(|_| !rows.is_empty())?;
        Some(LoraRows { index: part, rows, lora })
    };
    spans.iter().filter_map(share).collect()
}

fn layer_loras<'a, B: Backend>(
    layer: usize,
    projection: Projection,
    spans: &[Span<'a, B>],
) -> Vec<LoraRows<'a, B>> {
    let own = |adapter: &'a BoundAdapter<B>| &adapter.layers[layer][projection as usize];
    let parts = spans.iter().map(|(_, adapter)| own(adapter).len()).max().unwrap_or(0);
    let of = |part: usize| {
        loras(spans, part, Range::clone, move |adapter| own(adapter).get(part)?.as_ref())
    };
    (0..parts).flat_map(of).collect()
}

/// A projection has as many outputs as it was loaded with, which `checkpoint` decides.
fn outputs<T, const N: usize>(outputs: Vec<T>) -> [T; N] {
    outputs.try_into().unwrap_or_else(|_| unreachable!("a projection lost an output"))
}
