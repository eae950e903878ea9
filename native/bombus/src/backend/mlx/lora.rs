//! LoRA: what adapters add to rows of a linear layer or an embedding.

use super::{Adapted, LoraRows, LoraWeights, Mlx, arrays, cuda};
use crate::error::{Error, Result};
use mlx_rs::ops::indexing::{Ellipsis, take_axis};
use mlx_rs::{Array, Dtype, ops, transforms};
use std::ops::Range;
use std::rc::Rc;

/// LoRA A and B of one layer: a `[in, rank]`, b `[rank, out]`.
pub struct Lora {
    a: Array,
    b: Array,
    scale: Array,
    /// DoRA: what each output is multiplied with
    factors: Option<Array>,
    /// or the whole of a token's embedding
    by_token: bool,
    /// For the kernel that takes whole steps, where it serves this LoRA.
    pub packed: Option<Rc<cuda::Packed>>,
}

impl Lora {
    pub fn load(weights: &LoraWeights, adapted: Adapted<Mlx>) -> Result<Self> {
        let [mut a, mut b] = [arrays::load(&weights.a)?, arrays::load(&weights.b)?];
        if weights.transposed {
            (a, b) = (a.t(), b.t());
        }
        if let Some(outputs) = &weights.outputs {
            b = arrays::index(&b, (Ellipsis, outputs.start as i32..outputs.end as i32))?;
        }
        let embedding = matches!(adapted, Adapted::Embedding(_));
        let by_token = embedding && !weights.transposed;
        let scale = Array::from_f32(weights.scale);
        let mut lora = Self { a, b, scale, factors: None, by_token, packed: None };
        if let Some(magnitude) = &weights.magnitude {
            let mut magnitude = arrays::load(magnitude)?.as_dtype(Dtype::Float32)?;
            if let Some(outputs) = &weights.outputs {
                magnitude = arrays::rows(&magnitude, outputs)?;
            }
            let by_column = embedding && weights.transposed;
            let factors = magnitude.divide(lora.norms(adapted, by_column)?)?;
            transforms::eval([&factors])?;
            lora.factors = Some(factors);
        } else if let Adapted::Projection(linear, _) = adapted
            && linear.device.is_cuda()
        {
            lora.packed = cuda::Packed::new(&lora.a, &lora.b, weights.scale)?;
        }
        Ok(lora)
    }

    /// The norms of the rows of `W + scale * B A` (a row belongs to an output, or to a token), or of
    /// its columns.
    fn norms(&self, adapted: Adapted<Mlx>, by_column: bool) -> Result<Array> {
        // Dequantized, the largest matrices are too large for one go.
        const AT_ONCE: usize = 16 * 1024;
        let (linear, index, [left, right]) = match adapted {
            Adapted::Projection(linear, index) => (linear, index, [&self.b.t(), &self.a.t()]),
            Adapted::TiedHead(embedding) => (embedding, 0, [&self.b.t(), &self.a.t()]),
            Adapted::Embedding(embedding) => (embedding, 0, [&self.a, &self.b]),
        };
        let (weight, first) = linear.weight(index);
        let count = left.dim(0) as usize;
        let mut sums = vec![];
        for start in (0..count).step_by(AT_ONCE) {
            let rows = start..count.min(start + AT_ONCE);
            let ids: Vec<usize> = rows.clone().map(|row| first + row).collect();
            let own = weight.take(&arrays::indices(&ids))?.as_dtype(Dtype::Float32)?;
            let delta = arrays::rows(left, &rows)?.as_dtype(Dtype::Float32)?;
            let delta = delta.matmul(right.as_dtype(Dtype::Float32)?)?.multiply(&self.scale)?;
            let axis = if by_column { 0 } else { 1 };
            let sum = own.add(delta)?.square()?.sum_axis(axis, false)?;
            transforms::eval([&sum])?;
            sums.push(sum);
        }
        let sums = match by_column {
            true => ops::stack(&sums, 0)?.sum_axis(0, false)?,
            false => ops::concatenate(&sums, 0)?,
        };
        Ok(sums.sqrt()?)
    }

    /// x: `[rows, in]`; what `y` becomes
    pub fn apply(&self, x: &Array, y: Array) -> Result<Array> {
        let y = self.add(y, x.matmul(&self.a)?.matmul(&self.b)?, self.factors.clone())?;
        Ok(y.as_dtype(x.dtype())?)
    }

    pub fn is_dora(&self) -> bool {
        self.factors.is_some()
    }

    /// ids: `[rows]`; what their embeddings become
    pub fn embed(&self, ids: &Array, embedded: Array) -> Result<Array> {
        let own = |factors| Ok::<_, Error>(take_axis(factors, ids, 0)?.reshape(&[-1, 1])?);
        let factors = match &self.factors {
            Some(factors) if self.by_token => Some(own(factors)?),
            factors => factors.clone(),
        };
        self.add(embedded, take_axis(&self.a, ids, 0)?.matmul(&self.b)?, factors)
    }

    fn add(&self, y: Array, delta: Array, factors: Option<Array>) -> Result<Array> {
        // A bf16 adapter stays bf16, as in Python, where the scale is a weak scalar.
        let delta = delta.multiply(self.scale.as_dtype(delta.dtype())?)?;
        Ok(match factors {
            None => y.add(delta.as_dtype(y.dtype())?)?,
            // Rounded once.
            Some(factors) => {
                let sum = y.as_dtype(Dtype::Float32)?.add(delta)?;
                sum.multiply(factors)?.as_dtype(y.dtype())?
            }
        })
    }
}

/// `y`, with what the adapters of layer `index` make of their rows: `apply` says what.
pub fn apply_loras(
    y: Array,
    index: usize,
    loras: &[LoraRows<Mlx>],
    apply: impl Fn(&Range<usize>, &Lora, Array) -> Result<Array>,
) -> Result<Array> {
    let mut blocks = vec![];
    let mut done = 0;
    for LoraRows { rows, lora, .. } in loras.iter().filter(|lora| lora.index == index) {
        if done < rows.start {
            blocks.push(arrays::rows(&y, &(done..rows.start))?);
        }
        blocks.push(apply(rows, lora, arrays::rows(&y, rows)?)?);
        done = rows.end;
    }
    let all = y.dim(0) as usize;
    match blocks.len() {
        0 => return Ok(y),
        _ if done < all => blocks.push(arrays::rows(&y, &(done..all))?),
        1 => return Ok(blocks.remove(0)),
        _ => {}
    }
    Ok(ops::concatenate(&blocks, 0)?)
}
