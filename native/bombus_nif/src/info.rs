//! What a model is, without its weights.

use crate::answer::answer_later;
use crate::model::DeviceOption;
use bombus::error::Error;
use bombus::model::info::{self, Info, Part, Role, Steps};
use bombus::spec::{AttentionSpec, ModelSpec, Quantization, Rope, Scaling};
use rustler::{Atom, Env, NifMap, NifUnitEnum, Term};
use std::collections::BTreeMap;
use std::path::PathBuf;

mod atoms {
    rustler::atoms! { none, linear, dynamic, llama3, yarn, longrope, own, mlx, fused, layer_by_layer }
}

#[derive(NifMap)]
struct InfoTerm {
    family: String,
    language_model: Option<String>,
    layers: usize,
    hidden_size: usize,
    vocab_size: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    /// how many layers see so many positions
    windows: Vec<(usize, usize)>,
    rope: Option<RopeTerm>,
    /// how many layers are not rotated
    unrotated: usize,
    context: usize,
    parameters: u64,
    parts: Vec<PartTerm>,
    disk: u64,
    memory: MemoryTerm,
    device: DeviceOption,
    steps: (Atom, Option<String>),
    tokenizer: bool,
    chat_template: bool,
    missing_files: Vec<String>,
    missing_tensors: Vec<String>,
    warnings: Vec<String>,
    /// reason and message
    problems: Vec<(String, String)>,
}

#[derive(NifMap)]
struct RopeTerm {
    theta: f64,
    dim: usize,
    scaling: Atom,
    factor: Option<f64>,
}

#[derive(NifMap)]
struct PartTerm {
    role: RoleTerm,
    parameters: u64,
    layouts: Vec<LayoutTerm>,
}

#[derive(NifUnitEnum)]
enum RoleTerm {
    Embedding,
    Attention,
    Mlp,
    Head,
}

/// Without bits it is dense.
#[derive(NifMap)]
struct LayoutTerm {
    bits: Option<usize>,
    group_size: Option<usize>,
    parameters: u64,
}

#[derive(NifMap)]
struct MemoryTerm {
    weights: u64,
    kv_position: u64,
    kv_context: u64,
}

/// Answers `{reference, {:ok, info} | {:error, {reason, message}}}`.
#[rustler::nif]
fn model_info<'a>(
    env: Env<'a>,
    path: String,
    device: DeviceOption,
    reference: Term<'a>,
) -> Term<'a> {
    answer_later(env, reference, move || {
        let taken = device.device(None)?;
        let info = info::info(&PathBuf::from(path), taken)?;
        Ok(InfoTerm::new(info, DeviceOption::of(taken)))
    })
}

impl InfoTerm {
    fn new(info: Info, device: DeviceOption) -> Self {
        let spec = &info.config.spec;
        // A model has at least one layer.
        let attention = spec.layers.first().map(|layer| &layer.attention);
        let size = |of: fn(&AttentionSpec) -> usize| attention.map_or(0, of);
        let template_fault = info.chat_template.as_ref().err();
        Self {
            family: info.config.model_type.clone(),
            language_model: info.language_model,
            layers: spec.layers.len(),
            hidden_size: spec.hidden,
            vocab_size: spec.vocab,
            heads: size(|it| it.heads),
            kv_heads: size(|it| it.kv_heads),
            head_dim: size(|it| it.head_dim),
            windows: windows(spec),
            rope: rope(spec),
            unrotated: spec.layers.iter().filter(|layer| layer.attention.rope.is_none()).count(),
            context: spec.context,
            parameters: info.parameters,
            parts: info.parts.iter().map(part).collect(),
            disk: info.disk,
            memory: MemoryTerm {
                weights: info.weights,
                kv_position: info.kv.position,
                kv_context: info.kv.context,
            },
            device,
            steps: steps(info.steps),
            tokenizer: info.tokenizer,
            chat_template: matches!(info.chat_template, Ok(true)),
            missing_files: info.missing_files,
            missing_tensors: info.missing_tensors,
            problems: info.problem.iter().chain(template_fault).map(problem).collect(),
            warnings: info.config.warnings,
        }
    }
}

fn windows(spec: &ModelSpec) -> Vec<(usize, usize)> {
    let mut counts = BTreeMap::new();
    for window in spec.layers.iter().filter_map(|layer| layer.attention.window) {
        *counts.entry(window).or_insert(0) += 1;
    }
    counts.into_iter().map(|(window, layers)| (layers, window)).collect()
}

/// Of the first layer that is scaled, else of the first that is rotated.
fn rope(spec: &ModelSpec) -> Option<RopeTerm> {
    let ropes = || spec.layers.iter().filter_map(|layer| layer.attention.rope.as_ref());
    let scaled = ropes().find(|rope| rope.scaling != Scaling::None);
    let Rope { dim, theta, scaling, .. } = scaled.or(ropes().next())?;
    let (scaling, factor) = match scaling {
        Scaling::None => (atoms::none(), None),
        Scaling::Linear { factor } => (atoms::linear(), Some(*factor)),
        Scaling::Dynamic { factor, .. } => (atoms::dynamic(), Some(*factor)),
        Scaling::Llama3 { factor, .. } => (atoms::llama3(), Some(*factor)),
        Scaling::Yarn { factor, .. } => (atoms::yarn(), Some(*factor)),
        Scaling::Long { .. } => (atoms::longrope(), None),
    };
    Some(RopeTerm { theta: f64::from(*theta), dim: *dim, scaling, factor })
}

fn part(part: &Part) -> PartTerm {
    let role = match part.role {
        Role::Embedding => RoleTerm::Embedding,
        Role::Attention => RoleTerm::Attention,
        Role::Mlp => RoleTerm::Mlp,
        Role::Head => RoleTerm::Head,
    };
    let layout = |(layout, parameters): &(Option<Quantization>, u64)| LayoutTerm {
        bits: layout.map(|layout| layout.bits),
        group_size: layout.map(|layout| layout.group_size),
        parameters: *parameters,
    };
    let layouts = part.layouts.iter().map(layout).collect();
    PartTerm { role, parameters: part.parameters, layouts }
}

fn steps(steps: Steps) -> (Atom, Option<String>) {
    match steps {
        Steps::Own => (atoms::own(), None),
        Steps::Mlx => (atoms::mlx(), None),
        Steps::Fused => (atoms::fused(), None),
        Steps::LayerByLayer(reason) => (atoms::layer_by_layer(), Some(reason)),
    }
}

fn problem(error: &Error) -> (String, String) {
    (error.reason().to_owned(), error.message())
}
