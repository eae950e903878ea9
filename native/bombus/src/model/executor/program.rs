//! Which models the kernel for steps serves, and with what it is compiled for them.

use crate::backend::cuda::{LayerArrays, MatrixArrays, ModelArrays, Shape};
use crate::backend::mlx::{Linear, Mlx};
use crate::model::decoder::{Decoder, Layer};
use crate::spec::{AttentionSpec, LayerSpec, MlpSpec, ModelSpec, NormSpec, Rope, Scaling};
use mlx_rs::{Array, Dtype};

/// Why a model goes layer by layer, for people.
pub type Reason = String;

/// The kernel's numbers for a model. Every field of the spec is named here, so that a new one does
/// not compile until someone has decided whether the kernel serves it.
pub fn shape(spec: &ModelSpec) -> Result<(Shape, &Rope), Reason> {
    // The head is a matrix of its own, tied or not.
    let ModelSpec { hidden, vocab, layers, norm: NormSpec { eps }, head: _, context: _ } = spec;
    let first = layers.first().ok_or("it has no layers")?;
    let LayerSpec { attention, mlp, norm: NormSpec { eps: layer_eps } } = first;
    let AttentionSpec { heads, kv_heads, head_dim, rope, qk_norm, qkv_bias, o_bias } = attention;
    let MlpSpec { inner, bias } = mlp;
    let Rope { dim, theta, scaling } = rope;
    let refused = [
        (layers.iter().any(|layer| layer != first), "its layers differ"),
        (eps != layer_eps, "its norms differ"),
        (qk_norm.is_some_and(|NormSpec { eps: own }| own != *eps), "its norms differ"),
        (*o_bias, "`o_proj` has a bias"),
        (*bias, "the MLP has biases"),
        (dim != head_dim, "heads are rotated in part"),
        (rope.is_dynamic(), "its rotation depends on a text's length"),
        (!matches!(head_dim, 64 | 128), "its heads have other than 64 or 128 numbers"),
        (heads / kv_heads > 8, "more than 8 heads share keys and values"),
    ];
    if let Some((_, reason)) = refused.into_iter().find(|(is_so, _)| *is_so) {
        return Err(reason.into());
    }
    // Groups of inputs are taken by four where there are many.
    let odd = |inputs: usize| inputs / 64 > 16 && !(inputs / 64).is_multiple_of(4);
    if [*hidden, heads * head_dim, *inner].into_iter().any(odd) {
        return Err("its widths are no multiples of 256".into());
    }
    let shape = Shape {
        hidden: *hidden,
        inner: *inner,
        heads: *heads,
        kv_heads: *kv_heads,
        dim: *head_dim,
        layers: layers.len(),
        vocab: *vocab,
        eps: *eps,
        theta: *theta,
        qk_norm: qk_norm.is_some(),
        qkv_bias: *qkv_bias,
        scaled: *scaling != Scaling::None,
    };
    Ok((shape, rope))
}

/// The weights, all of the kind that the kernel takes.
pub fn arrays<'a>(
    decoder: &'a Decoder<Mlx>,
    rotation: &'a Array,
) -> Result<ModelArrays<'a>, Reason> {
    let head = decoder.lm_head.as_ref().unwrap_or(&decoder.embed_tokens);
    let layers: Result<_, Reason> = decoder.layers.iter().map(layer).collect();
    Ok(ModelArrays {
        layers: layers?,
        head: matrix(head)?,
        norm: bfloat16(&decoder.norm)?,
        embedding: matrix(&decoder.embed_tokens)?,
        rotation,
    })
}

fn layer(layer: &Layer<Mlx>) -> Result<LayerArrays<'_>, Reason> {
    let head_norms = layer.attention.norms.as_ref();
    head_norms.into_iter().flatten().try_for_each(|norm| bfloat16(norm).map(drop))?;
    Ok(LayerArrays {
        qkv: matrix(&layer.qkv_proj)?,
        o: matrix(&layer.o_proj)?,
        gate_up: matrix(&layer.gate_up_proj)?,
        down: matrix(&layer.down_proj)?,
        input_norm: bfloat16(&layer.input_layernorm)?,
        post_norm: bfloat16(&layer.post_attention_layernorm)?,
        head_norms,
        bias: layer.qkv_proj.bias_of_all().map(bfloat16).transpose()?,
    })
}

fn matrix(linear: &Linear) -> Result<MatrixArrays<'_>, Reason> {
    let matrix = linear.matrix().filter(|matrix| matrix.is_int4_group64());
    let other = "not all weights are in 4 bits, groups of 64 and bfloat16";
    matrix.map(|matrix| matrix.arrays).ok_or_else(|| other.into())
}

fn bfloat16(array: &Array) -> Result<&Array, Reason> {
    match array.dtype() {
        Dtype::Bfloat16 => Ok(array),
        other => Err(format!("its norms or biases are in {other:?}, not in bfloat16")),
    }
}
