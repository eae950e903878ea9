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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::HeadSpec;

    fn spec() -> ModelSpec {
        let rope = Rope { dim: 64, theta: 1e4, scaling: Scaling::None };
        let attention = AttentionSpec {
            heads: 4,
            kv_heads: 2,
            head_dim: 64,
            rope,
            qk_norm: None,
            qkv_bias: true,
            o_bias: false,
        };
        let norm = NormSpec { eps: 1e-6 };
        let mlp = MlpSpec { inner: 512, bias: false };
        let layers = vec![LayerSpec { attention, mlp, norm }; 3];
        ModelSpec { hidden: 256, vocab: 320, layers, norm, head: HeadSpec::Tied, context: 512 }
    }

    fn with(change: impl FnOnce(&mut ModelSpec)) -> Result<Shape, Reason> {
        let mut spec = spec();
        change(&mut spec);
        shape(&spec).map(|(shape, _)| shape)
    }

    #[test]
    fn the_kernel_serves_biases_of_qkv_and_scaled_rotations() {
        let plain = with(|_| {}).unwrap();
        assert!(plain.qkv_bias && !plain.qk_norm && !plain.scaled);
        let linear = Scaling::Linear { factor: 4.0 };
        let all = |spec: &mut ModelSpec| {
            spec.layers.iter_mut().for_each(|layer| layer.attention.rope.scaling = linear.clone());
        };
        assert!(with(all).unwrap().scaled);
    }

    #[test]
    fn a_model_that_it_does_not_serve_is_told_why() {
        let reason = |change: &dyn Fn(&mut LayerSpec)| {
            with(|spec| spec.layers.iter_mut().for_each(change)).err().unwrap_or_default()
        };
        assert!(reason(&|layer| layer.attention.o_bias = true).contains("o_proj"));
        assert!(reason(&|layer| layer.mlp.bias = true).contains("MLP"));
        assert!(reason(&|layer| layer.attention.kv_heads = 16).is_empty());
        assert!(reason(&|layer| layer.attention.heads = 18).contains("more than 8 heads"));
        let dynamic = Scaling::Dynamic { factor: 2.0, context: 64 };
        assert!(reason(&|layer| layer.attention.rope.scaling = dynamic.clone()).contains("length"));
        let differ = with(|spec| spec.layers[1].mlp.inner = 256).err().unwrap_or_default();
        assert_eq!(differ, "its layers differ");
    }
}
