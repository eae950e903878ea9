//! Which models the kernel for steps serves, and with what it is compiled for them.

use crate::backend::cuda::{Factors, LayerArrays, LayerKind, MatrixArrays, ModelArrays, Shape};
use crate::backend::mlx::{Linear, Mlx};
use crate::model::decoder::{Decoder, Layer};
use crate::spec::{
    Activation, AttentionSpec, BlockNorms, HeadSpec, HeadWeight, LayerSpec, MlpSpec, ModelSpec,
    NormSpec, QkNorm, Rope, Scaling,
};
use mlx_rs::{Array, Dtype};

/// A position that no sequence comes to; the kernel's numbers have 32 bits.
const FAR: usize = 1 << 30;

/// Why a model goes layer by layer, for people.
pub type Reason = String;

pub const OTHER_WEIGHTS: &str = "not all weights are in 4 bits, groups of 64 and bfloat16";

/// What the kernel is compiled for, and what it takes besides weights.
pub struct Program<'a> {
    pub shape: Shape,
    /// of all layers
    pub kinds: Vec<LayerKind>,
    /// which kinds choose from
    pub ropes: Vec<&'a Rope>,
}

impl<'a> Program<'a> {
    pub fn compile(spec: &'a ModelSpec) -> Result<Self, Reason> {
        let ropes = ropes(&spec.layers)?;
        let kinds: Vec<LayerKind> = spec.layers.iter().map(|layer| kind(layer, &ropes)).collect();
        Ok(Self { shape: shape(spec, &ropes, &kinds)?, kinds, ropes })
    }
}

/// The rotations of layers, each once.
fn ropes(layers: &[LayerSpec]) -> Result<Vec<&Rope>, Reason> {
    let mut ropes = vec![];
    for rope in layers.iter().filter_map(|layer| layer.attention.rope.as_ref()) {
        if !ropes.contains(&rope) {
            ropes.push(rope);
        }
    }
    match ropes.len() {
        0 => Err("its heads are not rotated".into()),
        1 | 2 => Ok(ropes),
        _ => Err("its layers have more than two rotations".into()),
    }
}

fn kind(layer: &LayerSpec, ropes: &[&Rope]) -> LayerKind {
    let rope = layer.attention.rope.as_ref();
    let rotation = ropes.iter().position(|other| Some(*other) == rope);
    LayerKind {
        unrotated: rope.is_none(),
        windowed: layer.attention.window.is_some(),
        rotation: rotation.unwrap_or(0),
    }
}

/// The window of the layers that have one.
fn window(layers: &[LayerSpec]) -> Result<usize, Reason> {
    let mut windows = layers.iter().filter_map(|layer| layer.attention.window);
    let Some(window) = windows.next() else { return Ok(0) };
    match windows.all(|other| other == window) {
        true => Ok(window.min(FAR)),
        false => Err("its layers have several windows".into()),
    }
}

/// The first reason that holds.
fn first_of<const N: usize>(reasons: [(bool, &str); N]) -> Result<(), Reason> {
    match reasons.into_iter().find(|(is_so, _)| *is_so) {
        Some((_, reason)) => Err(reason.into()),
        None => Ok(()),
    }
}

fn check_rope(rope: &Rope, head_dim: usize) -> Result<(), Reason> {
    let Rope { dim, theta: _, interleaved, scaling: _ } = rope;
    first_of([
        (*interleaved, "neighbours of a head are rotated together"),
        (*dim != head_dim, "heads are rotated in part"),
        (rope.is_dynamic(), "its rotation depends on a text's length"),
    ])
}

/// norm: the model's last
fn check_norms(norms: &BlockNorms, norm: &NormSpec) -> Result<(), Reason> {
    let BlockNorms { spec, before_attention, after_attention, before_mlp, after_mlp } = norms;
    let NormSpec { eps: _, plus_one: _, centered } = spec;
    first_of([
        (spec != norm, "its norms differ"),
        (*centered, "its norms subtract the mean"),
        (before_attention.is_none(), "no norm stands before attention"),
        (before_mlp.is_none(), "no norm stands before the MLP"),
        (after_attention.is_some() != after_mlp.is_some(), "one of two norms behind is absent"),
    ])
}

/// A layer without what its kind tells.
fn common(layer: &LayerSpec) -> LayerSpec {
    let mut layer = layer.clone();
    (layer.attention.rope, layer.attention.window) = (None, None);
    layer
}

/// The kernel's numbers for a model. Every field of the spec is named here, so that a new one does
/// not compile until someone has decided whether the kernel serves it.
fn shape(spec: &ModelSpec, ropes: &[&Rope], kinds: &[LayerKind]) -> Result<Shape, Reason> {
    // The head is a matrix of its own, tied or not.
    let ModelSpec { hidden, vocab, embedding_scale, layers, norm, head, context: _, names: _ } =
        spec;
    let HeadSpec { weight: head_weight, scale: head_scale, softcap: head_softcap } = head;
    let first = layers.first().ok_or("it has no layers")?;
    let LayerSpec { attention, mlp, norms, residual_scale, parallel } = first;
    let AttentionSpec {
        heads,
        kv_heads,
        head_dim,
        scale,
        rope: _,
        qk_norm,
        query_scaling,
        window: _,
        softcap,
        qkv_bias,
        o_bias,
        fused: _,
    } = attention;
    let MlpSpec { inner, activation, bias: mlp_bias, fused: _ } = mlp;
    let Rope { dim: _, theta, interleaved: _, scaling } = ropes[0];
    first_of([
        (*head_weight == HeadWeight::Absent, "it has no head"),
        (layers.iter().any(|layer| common(layer) != common(first)), "its layers differ"),
        (qk_norm.is_some_and(|own| own != QkNorm::each(*norm)), "its norms of heads are others"),
        (softcap.is_some() || head_softcap.is_some(), "its scores or logits are capped"),
        (*parallel, "its MLP stands beside attention"),
        (!matches!(head_dim, 64 | 128 | 256), "its heads have other than 64, 128 or 256 numbers"),
        (heads / kv_heads > 8, "more than 8 heads share keys and values"),
    ])?;
    check_norms(norms, norm)?;
    ropes.iter().try_for_each(|rope| check_rope(rope, *head_dim))?;
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
        eps: norm.eps,
        theta: *theta,
        qk_norm: qk_norm.is_some(),
        qkv_bias: *qkv_bias,
        o_bias: *o_bias,
        mlp_bias: *mlp_bias,
        scaled: ropes.len() > 1 || *scaling != Scaling::None,
        rotations: ropes.len(),
        unrotated: kinds.iter().any(|kind| kind.unrotated),
        window: window(layers)?,
        query_beta: query_scaling.map_or(0.0, |scaling| scaling.beta),
        query_context: query_scaling.map_or(1, |scaling| scaling.context.min(FAR)),
        gelu: match activation {
            Activation::Silu => false,
            Activation::Gelu => true,
        },
        post_norms: norms.after_mlp.is_some(),
        factors: Factors {
            embedding: bfloat16_of(*embedding_scale),
            residual: bfloat16_of(*residual_scale),
            logits: bfloat16_of(*head_scale),
            scores: (*scale != (*head_dim as f32).powf(-0.5)).then_some(*scale),
        },
    };
    Ok(shape)
}

/// A factor as MLX has it, which multiplies activations in their own type.
fn bfloat16_of(factor: f32) -> f32 {
    half::bf16::from_f32(factor).to_f32()
}

/// The weights, all of the kind that the kernel takes.
pub fn arrays<'a>(
    decoder: &'a Decoder<Mlx>,
    kinds: &[LayerKind],
    rotation: &'a Array,
) -> Result<ModelArrays<'a>, Reason> {
    let head = decoder.lm_head.as_ref().unwrap_or(&decoder.embed_tokens);
    let layers: Result<_, Reason> =
        decoder.layers.iter().zip(kinds).map(|(own, kind)| layer(own, *kind)).collect();
    Ok(ModelArrays {
        layers: layers?,
        head: matrix(head)?,
        norm: bfloat16(&decoder.norm)?,
        embedding: matrix(&decoder.embed_tokens)?,
        rotation,
    })
}

fn layer(layer: &Layer<Mlx>, kind: LayerKind) -> Result<LayerArrays<'_>, Reason> {
    let head_norms = layer.attention.norms.as_ref();
    head_norms.into_iter().flatten().try_for_each(|norm| bfloat16(norm).map(drop))?;
    Ok(LayerArrays {
        qkv: matrix(&layer.qkv_proj)?,
        o: matrix(&layer.o_proj)?,
        gate_up: matrix(&layer.gate_up_proj)?,
        down: matrix(&layer.down_proj)?,
        input_norm: norm(&layer.before_attention)?,
        post_norm: norm(&layer.before_mlp)?,
        after: [after(&layer.after_attention)?, after(&layer.after_mlp)?],
        head_norms,
        biases: [
            bias(&layer.qkv_proj)?,
            bias(&layer.o_proj)?,
            bias(&layer.gate_up_proj)?,
            bias(&layer.down_proj)?,
        ],
        kind,
    })
}

fn matrix(linear: &Linear) -> Result<MatrixArrays<'_>, Reason> {
    let matrix = linear.matrix().filter(|matrix| matrix.is_int4_group64());
    matrix.map(|matrix| matrix.arrays).ok_or_else(|| OTHER_WEIGHTS.into())
}

fn bias(linear: &Linear) -> Result<Option<&Array>, Reason> {
    linear.bias_of_all().map(bfloat16).transpose()
}

fn after(norm: &Option<Array>) -> Result<Option<&Array>, Reason> {
    norm.as_ref().map(bfloat16).transpose()
}

fn norm(norm: &Option<Array>) -> Result<&Array, Reason> {
    bfloat16(norm.as_ref().ok_or("a norm is absent")?)
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
    use crate::spec::{Names, QueryScaling};

    fn spec() -> ModelSpec {
        let rope = Rope::new(64, 1e4, Scaling::None);
        let attention = AttentionSpec { qkv_bias: true, ..AttentionSpec::plain(4, 2, 64, rope) };
        let norm = NormSpec::rms(1e-6);
        let mlp = MlpSpec { inner: 512, activation: Activation::Silu, bias: false, fused: false };
        let norms = BlockNorms::before(norm);
        let layer = LayerSpec { attention, mlp, norms, residual_scale: 1.0, parallel: false };
        ModelSpec {
            hidden: 256,
            vocab: 320,
            embedding_scale: 1.0,
            layers: vec![layer; 3],
            norm,
            head: HeadSpec::plain(HeadWeight::Tied),
            context: 512,
            names: Names::default(),
        }
    }

    fn with(change: impl FnOnce(&mut ModelSpec)) -> Result<Shape, Reason> {
        let mut spec = spec();
        change(&mut spec);
        Program::compile(&spec).map(|program| program.shape)
    }

    #[test]
    fn the_kernel_serves_biases_of_qkv_and_scaled_rotations() {
        let plain = with(|_| {}).unwrap();
        assert!(plain.qkv_bias && !plain.qk_norm && !plain.scaled);
        let linear = Scaling::Linear { factor: 4.0 };
        let all = |spec: &mut ModelSpec| {
            for layer in &mut spec.layers {
                layer.attention.rope = Some(Rope::new(64, 1e4, linear.clone()));
            }
        };
        assert!(with(all).unwrap().scaled);
    }

    #[test]
    fn the_kernel_serves_biases_of_o_and_of_the_mlp() {
        let of = |change: fn(&mut LayerSpec)| {
            let shape = with(|spec| spec.layers.iter_mut().for_each(change)).unwrap();
            [shape.o_bias, shape.mlp_bias]
        };
        assert_eq!(of(|_| {}), [false, false]);
        assert_eq!(of(|layer| layer.attention.o_bias = true), [true, false]);
        assert_eq!(of(|layer| layer.mlp.bias = true), [false, true]);
    }

    #[test]
    fn the_kernel_serves_the_four_factors_of_granite() {
        let plain = with(|_| {}).unwrap().factors;
        assert_eq!([plain.embedding, plain.residual, plain.logits], [1.0; 3]);
        assert_eq!(plain.scores, None);
        let granite = with(|spec| {
            (spec.embedding_scale, spec.head.scale) = (12.0, 0.125);
            for layer in &mut spec.layers {
                (layer.residual_scale, layer.attention.scale) = (0.22, 0.015_625);
            }
        });
        let factors = granite.unwrap().factors;
        // 0.22 in bfloat16.
        let all = [factors.embedding, factors.residual, factors.logits];
        assert_eq!(all, [12.0, 0.219_726_56, 0.125]);
        assert_eq!(factors.scores, Some(0.015_625));
    }

    #[test]
    fn the_kernel_serves_layers_whose_heads_are_not_rotated() {
        let mut spec = spec();
        spec.layers[0].attention.rope = None;
        let Program { shape, kinds, ropes } = Program::compile(&spec).unwrap();
        assert!(shape.unrotated && ropes.len() == 1);
        assert_eq!(
            kinds.iter().map(|kind| kind.unrotated).collect::<Vec<_>>(),
            [true, false, false]
        );
        assert!(!with(|_| {}).unwrap().unrotated);
        let none =
            with(|spec| spec.layers.iter_mut().for_each(|layer| layer.attention.rope = None));
        assert_eq!(none.err().unwrap(), "its heads are not rotated");
    }

    #[test]
    fn the_kernel_serves_what_gemma_3_has() {
        let mut spec = spec();
        for layer in &mut spec.layers {
            layer.mlp.activation = Activation::Gelu;
            layer.norms.after_attention = Some("post_attention_layernorm");
            layer.norms.after_mlp = Some("post_feedforward_layernorm");
        }
        spec.layers[1].attention.rope = Some(Rope::new(64, 1e6, Scaling::None));
        let Program { shape, kinds, ropes } = Program::compile(&spec).unwrap();
        assert!(shape.gelu && shape.post_norms && shape.scaled);
        assert_eq!((shape.rotations, ropes[1].theta), (2, 1e6));
        assert_eq!(kinds.iter().map(|kind| kind.rotation).collect::<Vec<_>>(), [0, 1, 0]);
        let shape = with(|_| {}).unwrap();
        assert!(!shape.gelu && !shape.post_norms && shape.rotations == 1);
        let three = with(|spec| {
            for (layer, theta) in spec.layers.iter_mut().zip([1e3, 1e4, 1e5]) {
                layer.attention.rope = Some(Rope::new(64, theta, Scaling::None));
            }
        });
        assert_eq!(three.err().unwrap(), "its layers have more than two rotations");
    }

    #[test]
    fn the_kernel_serves_one_window_in_some_layers() {
        let mut spec = spec();
        spec.layers[1].attention.window = Some(512);
        let Program { shape, kinds, .. } = Program::compile(&spec).unwrap();
        assert_eq!(shape.window, 512);
        assert_eq!(
            kinds.iter().map(|kind| kind.windowed).collect::<Vec<_>>(),
            [false, true, false]
        );
        spec.layers[0].attention.window = Some(256);
        assert_eq!(Program::compile(&spec).err().unwrap(), "its layers have several windows");
    }

    #[test]
    fn the_kernel_serves_queries_that_grow_with_their_position() {
        let scaling = QueryScaling { beta: 0.1, context: 512 };
        let grow = |spec: &mut ModelSpec| {
            spec.layers.iter_mut().for_each(|layer| layer.attention.query_scaling = Some(scaling));
        };
        let shape = with(grow).unwrap();
        assert_eq!((shape.query_beta, shape.query_context), (0.1, 512));
    }

    #[test]
    fn a_model_that_it_does_not_serve_is_told_why() {
        let reason = |change: &dyn Fn(&mut LayerSpec)| {
            with(|spec| spec.layers.iter_mut().for_each(change)).err().unwrap_or_default()
        };
        assert!(reason(&|layer| layer.attention.kv_heads = 16).is_empty());
        assert!(reason(&|layer| layer.attention.heads = 18).contains("more than 8 heads"));
        let dynamic = Scaling::Dynamic { factor: 2.0, context: 64 };
        let dynamic = Rope::new(64, 1e4, dynamic);
        assert!(reason(&|layer| layer.attention.rope = Some(dynamic.clone())).contains("length"));
        let olmo = |layer: &mut LayerSpec| layer.norms = BlockNorms::after(layer.norms.spec);
        assert_eq!(reason(&olmo), "no norm stands before attention");
        assert!(reason(&|layer| layer.norms.after_mlp = Some("norm")).contains("one of two"));
        assert!(reason(&|layer| layer.attention.softcap = Some(50.0)).contains("capped"));
        let differ = with(|spec| spec.layers[1].mlp.inner = 256).err().unwrap_or_default();
        assert_eq!(differ, "its layers differ");
    }
}
