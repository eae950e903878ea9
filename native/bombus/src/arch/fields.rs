//! What the families' fields have in common.

use crate::error::Result;
use crate::files::Fields;
use crate::spec::{
    AttentionSpec, HeadSpec, LayerSpec, MlpSpec, ModelSpec, NormSpec, Rope, Scaling,
};

/// More layers no model has: an allocation is not to depend on a number in a file.
const MOST_LAYERS: usize = 4096;

/// A model whose layers are all alike.
pub struct Uniform {
    pub attention: AttentionSpec,
    pub mlp_bias: bool,
    pub eps: f32,
    /// `tie_word_embeddings` where it is not said
    pub tied: bool,
    /// `max_position_embeddings` where it is not said
    pub context: usize,
}

impl Uniform {
    pub fn spec(self, fields: &Fields) -> Result<ModelSpec> {
        let Self { attention, mlp_bias, eps, tied, context } = self;
        check_heads(fields, &attention)?;
        refuse_other_activations(fields)?;
        let norm = NormSpec { eps };
        let mlp = MlpSpec { inner: fields.size("intermediate_size")?, bias: mlp_bias };
        let layers = fields.size("num_hidden_layers")?;
        if layers > MOST_LAYERS {
            let problem = format!("expected at most {MOST_LAYERS} layers");
            return Err(fields.error("num_hidden_layers", problem));
        }
        let tied = fields.flag_or("tie_word_embeddings", tied)?;
        let context = fields.size_or("max_position_embeddings", context)?;
        Ok(ModelSpec {
            hidden: fields.size("hidden_size")?,
            vocab: fields.size("vocab_size")?,
            context: extended(context, &attention.rope),
            layers: vec![LayerSpec { attention, mlp, norm }; layers],
            norm,
            head: if tied { HeadSpec::Tied } else { HeadSpec::Linear },
        })
    }
}

/// The context that a scaled rotation is for.
fn extended(context: usize, rope: &Rope) -> usize {
    let times = |context: usize, factor: f64| (context as f64 * factor) as usize;
    match rope.scaling {
        Scaling::Linear { factor } | Scaling::Dynamic { factor, .. } => times(context, factor),
        Scaling::Yarn { factor, context: original, .. } => context.max(times(original, factor)),
        Scaling::None | Scaling::Llama3 { .. } => context,
    }
}

pub fn eps(fields: &Fields, default: Option<f64>) -> Result<f32> {
    const FIELD: &str = "rms_norm_eps";
    if default.is_none() {
        fields.required(FIELD, fields.value(FIELD))?;
    }
    let eps = fields.number_or(FIELD, default.unwrap_or_default())? as f32;
    match eps >= 0.0 && eps.is_finite() {
        true => Ok(eps),
        false => Err(fields.error(FIELD, "expected a number of at least 0")),
    }
}

/// `hidden_size / num_attention_heads`
pub fn head_dim(fields: &Fields, heads: usize) -> Result<usize> {
    let hidden = fields.size("hidden_size")?;
    match hidden.is_multiple_of(heads) {
        true => Ok(hidden / heads),
        false => Err(fields.error("num_attention_heads", "it must divide hidden_size")),
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

/// These families are of SwiGLU, which transformers makes of `hidden_act`.
fn refuse_other_activations(fields: &Fields) -> Result<()> {
    match fields.value("hidden_act").is_some_and(|act| act != "silu" && act != "swish") {
        true => Err(fields.unsupported("hidden_act", "silu is")),
        false => Ok(()),
    }
}
