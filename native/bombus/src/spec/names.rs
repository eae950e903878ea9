//! What a model's tensors are called in files: as its modules are, or with other beginnings.

/// How names in a file become module paths.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Names {
    /// A language model inside another: its names have a prefix, and the other's tensors are left.
    pub wrapped: bool,
}

/// Where a wrapper has its language model, and what its names become. Reference: mlx-lm's
/// `models/mistral3.py`, `models/gemma3.py`.
const WRAPPED: [(&str, &str); 4] = [
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.", "model."),
];

/// What a model without `model.` has at its top, as published for embeddings.
const BARE: [&str; 3] = ["layers.", "embed_tokens.", "norm."];

/// The modules of a model.
const KNOWN: [&str; 2] = ["model.", "lm_head."];

impl Names {
    /// The name of a tensor or the path of a module, as this model has it: `None` for what is a
    /// wrapper's own.
    pub fn own(&self, name: &str) -> Option<String> {
        if self.wrapped {
            for (prefix, ours) in WRAPPED {
                if let Some(rest) = name.strip_prefix(prefix) {
                    return Some(format!("{ours}{rest}"));
                }
            }
            return KNOWN
                .iter()
                .any(|known| name.starts_with(known) && !is_tower(name))
                .then(|| name.into());
        }
        match BARE.iter().any(|bare| name.starts_with(bare)) {
            true => Some(format!("model.{name}")),
            false => Some(name.into()),
        }
    }
}

impl Names {
    /// A module's path, as this model has it.
    pub fn own_path(&self, path: &str) -> Option<String> {
        let mut own = self.own(&format!("{path}."))?;
        own.pop();
        Some(own)
    }

    /// What files may call a module beside its path.
    pub fn others(&self, path: &str) -> impl Iterator<Item = String> {
        let path = format!("{path}.");
        let wrapped = WRAPPED.iter().filter(|_| self.wrapped).filter_map({
            let path = path.clone();
            move |(prefix, ours)| Some(format!("{prefix}{}", path.strip_prefix(ours)?))
        });
        let bare = path.strip_prefix("model.").filter(|_| !self.wrapped).map(str::to_owned);
        wrapped.chain(bare).map(|mut path| {
            path.pop();
            path
        })
    }
}

/// `model.vision_tower.encoder...`
fn is_tower(name: &str) -> bool {
    ["vision", "visual", "multi_modal", "audio", "image"]
        .iter()
        .any(|word| name.strip_prefix("model.").is_some_and(|rest| rest.starts_with(word)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_language_model_is_found_in_what_wraps_it() {
        let names = Names { wrapped: true };
        for (name, own) in [
            (
                "language_model.model.layers.0.mlp.up_proj.weight",
                Some("model.layers.0.mlp.up_proj.weight"),
            ),
            ("model.language_model.embed_tokens.weight", Some("model.embed_tokens.weight")),
            ("language_model.lm_head.weight", Some("lm_head.weight")),
            ("model.layers.1.mlp.up_proj.weight", Some("model.layers.1.mlp.up_proj.weight")),
            ("lm_head.weight", Some("lm_head.weight")),
            ("vision_tower.patch_conv.weight", None),
            ("model.vision_tower.patch_conv.weight", None),
            ("multi_modal_projector.linear_1.weight", None),
            ("model.multi_modal_projector.norm.weight", None),
        ] {
            assert_eq!(names.own(name).as_deref(), own, "{name}");
        }
    }

    #[test]
    fn a_model_may_do_without_its_first_name() {
        let names = Names::default();
        for (name, own) in [
            ("layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
            ("norm.weight", "model.norm.weight"),
            ("model.norm.weight", "model.norm.weight"),
            ("vision_tower.weight", "vision_tower.weight"),
        ] {
            assert_eq!(names.own(name).as_deref(), Some(own), "{name}");
        }
    }
}
