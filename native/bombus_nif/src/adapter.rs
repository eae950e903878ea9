//! Adapters: read here, bound to a model by its engine.

use crate::answer::{Address, answer_later, result_term};
use crate::held::Held;
use bombus::error::catch_in;
use bombus::model::adapter::Adapter;
use rustler::{Env, Resource, ResourceArc, Term};
use std::path::PathBuf;

mod atoms {
    rustler::atoms! { mlx_lm, peft }
}

pub struct AdapterHandle(pub Held<Adapter>);

#[rustler::resource_impl]
impl Resource for AdapterHandle {}

/// Answers `{reference, {:ok, {handle, format, rank, scale, warnings}} | {:error, {reason, message}}}`.
#[rustler::nif]
fn load_adapter<'a>(
    env: Env<'a>,
    path: String,
    scale: Option<f64>,
    reference: Term<'a>,
) -> Term<'a> {
    answer_later(env, reference, move || {
        let adapter = catch_in(&format!("loading `{path}`"), || {
            Adapter::open(&PathBuf::from(&path), scale.map(|scale| scale as f32))
        })?;
        let (rank, scale, warnings) = (adapter.rank, adapter.scale, adapter.warnings.clone());
        let format = if adapter.is_peft() { atoms::peft() } else { atoms::mlx_lm() };
        let handle = AdapterHandle(Held::new("adapter", adapter));
        Ok((ResourceArc::new(handle), format, rank, scale, warnings))
    })
}

/// Answers `{reference, {:ok, :ok}}` when the last request with it has ended, or is cancelled; later ones
/// are refused.
#[rustler::nif]
fn unload_adapter<'a>(
    env: Env<'a>,
    handle: ResourceArc<AdapterHandle>,
    cancel: bool,
    reference: Term<'a>,
) -> Term<'a> {
    let address = Address::caller(env, reference);
    let done = move || address.tell_ok();
    match handle.0.take() {
        Some(adapter) => {
            adapter.on_drop(done);
            if cancel {
                adapter.cancel();
            }
        }
        None => done(),
    }
    result_term(env, &Ok(rustler::types::atom::ok()))
}
