//! Adapters: read here, bound to a model by its engine.

use crate::answer::{Address, result_term};
use bombus::adapter::Adapter;
use rustler::{Env, Resource, ResourceArc, Term};
use std::path::PathBuf;
use std::sync::Arc;

pub struct AdapterHandle(pub Arc<Adapter>);

#[rustler::resource_impl]
impl Resource for AdapterHandle {}

/// Answers `{reference, {:ok, {handle, rank, scale}} | {:error, {reason, message}}}`.
#[rustler::nif]
fn load_adapter<'a>(
    env: Env<'a>,
    path: String,
    scale: Option<f64>,
    reference: Term<'a>,
) -> Term<'a> {
    let started = Address::caller(env, reference).answer_later(move || {
        let adapter = Adapter::open(&PathBuf::from(path), scale.map(|scale| scale as f32))?;
        let (rank, scale) = (adapter.rank, adapter.scale);
        Ok((ResourceArc::new(AdapterHandle(Arc::new(adapter))), rank, scale))
    });
    result_term(env, &started.map(|()| rustler::types::atom::ok()))
}
