//! What the families' fields have in common.

use crate::error::Result;
use crate::files::Fields;
use crate::spec::{
    Activation, AttentionSpec, BlockNorms, HeadSpec, HeadWeight, LayerSpec, MlpSpec, ModelSpec,
    Names, NormSpec, Rope, Scaling,
};
use serde_json::Value;

/// More layers no model has: an allocation is not to depend on a number in a file.
const MOST_LAYERS: usize = 4096;

/// A model whose layers are all alike; what differs is put in afterwards.
pub struct Uniform {
    pub attention: AttentionSpec,
    pub activation: Activation,
    pub mlp_bias: bool,
    pub mlp_fused: bool,
    pub norms: BlockNorms,
    pub head: HeadWeight,
    /// `max_position_embeddings` where it is not said
    pub context: usize,
}

impl Uniform {
    /// SwiGLU without biases, a norm before attention and one before the MLP.
    pub fn new(attention: AttentionSpec, eps: f32, head: HeadWeight, context: usize) -> Self {
        let norms = BlockNorms::before(NormSpec::rms(eps));
        let (activation, mlp_bias, mlp_fused) = (Activation::Silu, false, false);
        Self { attention, activation, mlp_bias, mlp_fused, norms, head, context }
    }

    pub fn spec(self, fields: &Fields) -> Result<ModelSpec> {
        let Self { attention, activation, mlp_bias: bias, mlp_fused: fused, norms, head, context } =
            self;
        check_heads(fields, &attention)?;
        check_activation(fields, activation)?;
        let inner = fields.size("intermediate_size")?;
        let mlp = MlpSpec { inner, activation, bias, fused };
        let context = fields.size_or("max_position_embeddings", context)?;
        let (norm, layers) = (norms.spec, layers(fields)?);
        let context = extended(context, attention.rope.as_ref());
        let layer = LayerSpec { attention, mlp, norms, residual_scale: 1.0, parallel: false };
        Ok(ModelSpec {
            hidden: fields.size("hidden_size")?,
            vocab: fields.size("vocab_size")?,
            embedding_scale: 1.0,
            context,
            layers: vec![layer; layers],
            norm,
            head: HeadSpec::plain(head),
            names: Names::default(),
        })
    }
}

pub fn layers(fields: &Fields) -> Result<usize> {
    let layers = fields.size("num_hidden_layers")?;
    match layers > MOST_LAYERS {
        true => {
            let problem = format!("expected at most {MOST_LAYERS} layers");
            Err(fields.error("num_hidden_layers", problem))
        }
        false => Ok(layers),
    }
}

/// `tie_word_embeddings`; `tied` where it is not said
pub fn head(fields: &Fields, tied: bool) -> Result<HeadWeight> {
    let tied = fields.flag_or("tie_word_embeddings", tied)?;
    Ok(if tied { HeadWeight::Tied } else { HeadWeight::Linear })
}

/// The context that a scaled rotation is for.
fn extended(context: usize, rope: Option<&Rope>) -> usize {
    let times = |context: usize, factor: f64| (context as f64 * factor) as usize;
    match rope.map_or(&Scaling::None, |rope| &rope.scaling) {
        Scaling::Linear { factor } | Scaling::Dynamic { factor, .. } => times(context, *factor),
        Scaling::Yarn { factor, context: original, .. } => context.max(times(*original, *factor)),
        Scaling::None | Scaling::Llama3 { .. } | Scaling::Long { .. } => context,
    }
}

pub fn eps(fields: &Fields, default: Option<f64>) -> Result<f32> {
    eps_of(fields, "rms_norm_eps", default)
}

pub fn eps_of(fields: &Fields, field: &str, default: Option<f64>) -> Result<f32> {
    if default.is_none() {
        fields.required(field, fields.value(field))?;
    }
    let eps = fields.number_or(field, default.unwrap_or_default())? as f32;
    match eps >= 0.0 && eps.is_finite() {
        true => Ok(eps),
        false => Err(fields.error(field, "expected a number of at least 0")),
    }
}

/// A finite number other than 0, in float32.
pub fn factor(fields: &Fields, field: &str, default: Option<f64>) -> Result<f32> {
    if default.is_none() {
        fields.required(field, fields.value(field))?;
    }
    let factor = fields.number_or(field, default.unwrap_or_default())? as f32;
    match factor.is_finite() && factor != 0.0 {
        true => Ok(factor),
        false => Err(fields.error(field, "expected a number other than 0")),
    }
}

/// `num_key_value_heads`, as many as there are heads where it is not said
pub fn kv_heads(fields: &Fields, heads: usize) -> Result<usize> {
    fields.size_or("num_key_value_heads", heads)
}

/// `hidden_size / num_attention_heads`
pub fn head_dim(fields: &Fields, heads: usize) -> Result<usize> {
    let hidden = fields.size("hidden_size")?;
    match hidden.is_multiple_of(heads) {
        true => Ok(hidden / heads),
        false => Err(fields.error("num_attention_heads", "it must divide hidden_size")),
    }
}

/// `head_dim`, else `hidden_size / num_attention_heads`
pub fn own_head_dim(fields: &Fields, heads: usize) -> Result<usize> {
    match fields.optional_size("head_dim")? {
        Some(head_dim) => Ok(head_dim),
        None => head_dim(fields, heads),
    }
}

fn check_heads(fields: &Fields, attention: &AttentionSpec) -> Result<()> {
    let AttentionSpec { heads, kv_heads, head_dim, .. } = *attention;
    if !heads.is_multiple_of(kv_heads) {
        return Err(fields.error("num_key_value_heads", "it must divide num_attention_heads"));
    }
    if !head_dim.is_multiple_of(2) {
        return Err(fields.error("head_dim", "it must be even"));
    }
    if heads.saturating_mul(head_dim) > i32::MAX as usize {
        return Err(fields.error("head_dim", "it is too large for so many heads"));
    }
    Ok(())
}

/// Which activation a family is of, transformers makes of `hidden_act`; of Gemma `hidden_activation`
/// decides, and an old "gelu" beside it is the same.
fn check_activation(fields: &Fields, activation: Activation) -> Result<()> {
    let (names, supported): (&[&str], _) = match activation {
        Activation::Silu => (&["silu", "swish"], "silu is"),
        Activation::Gelu => (&["gelu_pytorch_tanh", "gelu_new", "gelu"], "gelu_pytorch_tanh is"),
    };
    for field in ["hidden_activation", "hidden_act"] {
        let known = |act: &Value| act.as_str().is_some_and(|act| names.contains(&act));
        if fields.value(field).is_some_and(|act| !known(act)) {
            return Err(fields.unsupported(field, supported));
        }
    }
    Ok(())
}
