//! Files of tensors: opened, read where they are mapped, and written.

use crate::answer::{answer_later, result_term};
use bombus::error::{Error, Result};
use bombus::files::mapped::Mapped;
use bombus::files::safetensors::{NewTensor, TensorFiles};
use rustler::env::SavedTerm;
use rustler::{Binary, Env, OwnedEnv, Resource, ResourceArc, Term};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

pub struct TensorFilesHandle(TensorFiles);

#[rustler::resource_impl]
impl Resource for TensorFilesHandle {}

/// Keeps a file mapped as long as a binary lies in it.
struct MappedHandle(Mapped);

#[rustler::resource_impl]
impl Resource for MappedHandle {}

/// name, dtype, shape
type Entry = (String, String, Vec<usize>);

/// Answers `{reference, {:ok, {handle, [{name, dtype, shape}], metadata}} | {:error, _}}`.
#[rustler::nif]
fn open_tensors<'a>(env: Env<'a>, path: String, reference: Term<'a>) -> Term<'a> {
    answer_later(env, reference, move || {
        let path = Path::new(&path);
        let files = match path.is_dir() {
            true => TensorFiles::open(path)?,
            false => TensorFiles::open_one(path)?,
        };
        let entry = |name: &str| {
            let view = files.require(name)?;
            Ok((name.to_owned(), view.dtype.to_string(), view.shape.to_vec()))
        };
        let entries = files.names().map(entry).collect::<Result<Vec<Entry>>>()?;
        let metadata = files.metadata();
        Ok((ResourceArc::new(TensorFilesHandle(files)), entries, metadata))
    })
}

/// `{:ok, binary}`, where the file is mapped.
#[rustler::nif]
fn read_tensor<'a>(env: Env<'a>, files: ResourceArc<TensorFilesHandle>, name: String) -> Term<'a> {
    let mapped = files.0.require(&name).and_then(|view| {
        let mapped = view.map();
        mapped.file.check()?;
        Ok(ResourceArc::new(MappedHandle(mapped)))
    });
    let binary = mapped.map(|mapped| mapped.make_binary(env, |mapped| mapped.0.bytes()));
    result_term(env, &binary)
}

/// Answers `{reference, {:ok, :ok} | {:error, _}}`.
#[rustler::nif]
fn write_tensors<'a>(
    env: Env<'a>,
    path: String,
    entries: Term<'a>,
    metadata: Option<HashMap<String, String>>,
    reference: Term<'a>,
) -> Term<'a> {
    // Large binaries are shared with the caller, not copied.
    let own = OwnedEnv::new();
    let entries = own.save(entries);
    let write = move || own.run(|env| write(env, &PathBuf::from(path), &entries, metadata));
    answer_later(env, reference, write)
}

fn write(
    env: Env,
    path: &Path,
    entries: &SavedTerm,
    metadata: Option<HashMap<String, String>>,
) -> Result<rustler::Atom> {
    let wrong = |_| Error::Request("expected tensors as {name, dtype, shape, binary}".into());
    let entries: Vec<(String, String, Vec<usize>, Binary)> =
        entries.load(env).decode().map_err(wrong)?;
    let tensors = entries
        .iter()
        .map(|(name, dtype, shape, binary)| NewTensor::new(name, dtype, shape, binary.as_slice()));
    bombus::files::safetensors::write(path, tensors.collect::<Result<Vec<_>>>()?, metadata)?;
    Ok(rustler::types::atom::ok())
}
