//! An attention layer as a value.

use super::{NormSpec, Rope};

#[derive(Clone, Debug, PartialEq)]
pub struct AttentionSpec {
    pub heads: usize,
    /// Keys and values; each is for `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// even
    pub head_dim: usize,
    /// What scores are multiplied by.
    pub scale: f32,
    /// None: positions count for nothing but their order
    pub rope: Option<Rope>,
    pub qk_norm: Option<QkNorm>,
    pub query_scaling: Option<QueryScaling>,
    /// A token sees itself and those before it, so many together.
    pub window: Option<usize>,
    /// Scores become `softcap * tanh(score / softcap)`.
    pub softcap: Option<f32>,
    pub qkv_bias: bool,
    pub o_bias: bool,
    /// q, k and v are one matrix in the file, `qkv_proj`
    pub fused: bool,
}

/// Norms of q and of k.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QkNorm {
    pub spec: NormSpec,
    pub heads: NormedHeads,
    /// of q's and of k's
    pub names: [&'static str; 2],
}

/// What is normed at once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum NormedHeads {
    /// each head, before it is rotated
    Each,
    /// each head, once it is rotated
    EachRotated,
    /// all heads of a row together, before they are rotated
    All,
}

/// Queries of far positions are longer: times `1 + beta ln(1 + floor(position / context))`.
/// Source: Llama 4's attention temperature, as in mlx-lm's `models/ministral3.py`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QueryScaling {
    pub beta: f32,
    pub context: usize,
}

impl AttentionSpec {
    /// As most families have it: full attention of heads that are rotated, without norms or biases.
    pub fn plain(heads: usize, kv_heads: usize, head_dim: usize, rope: Rope) -> Self {
        Self {
            heads,
            kv_heads,
            head_dim,
            scale: (head_dim as f32).powf(-0.5),
            rope: Some(rope),
            qk_norm: None,
            query_scaling: None,
            window: None,
            softcap: None,
            qkv_bias: false,
            o_bias: false,
            fused: false,
        }
    }

    /// The query heads that share the keys and values of one head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// The widths of the norms of q and of k.
    pub fn norm_widths(&self, heads: NormedHeads) -> [usize; 2] {
        match heads {
            NormedHeads::Each | NormedHeads::EachRotated => [self.head_dim; 2],
            NormedHeads::All => [self.heads, self.kv_heads].map(|heads| heads * self.head_dim),
        }
    }

    /// The first position that one at `position` sees.
    pub fn first_seen(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }
}

impl QkNorm {
    pub fn each(spec: NormSpec) -> Self {
        Self { spec, heads: NormedHeads::Each, names: ["q_norm", "k_norm"] }
    }
}

impl QueryScaling {
    pub fn factor(&self, position: usize) -> f32 {
        1.0 + self.beta * (1.0 + (position / self.context) as f32).ln()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Scaling;

    #[test]
    fn a_window_counts_the_token_itself() {
        let rope = Rope::new(4, 1e4, Scaling::None);
        let mut attention = AttentionSpec::plain(2, 1, 4, rope);
        assert_eq!(attention.first_seen(9), 0);
        attention.window = Some(4);
        assert_eq!([0, 3, 4, 9].map(|position| attention.first_seen(position)), [0, 0, 1, 6]);
    }

    /// Values of mlx-lm's `_get_llama_4_attn_scale`.
    #[test]
    fn queries_grow_behind_the_context() {
        let scaling = QueryScaling { beta: 0.1, context: 16 };
        assert_eq!(scaling.factor(15), 1.0);
        assert!((scaling.factor(16) - 1.069_314_7).abs() < 1e-6);
        assert!((scaling.factor(47) - 1.109_861_2).abs() < 1e-6);
    }
}
