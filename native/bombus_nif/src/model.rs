//! Models: loading, and what they are.

use crate::answer::{Address, answer_later, result_term};
use bombus::backend::Device;
use bombus::backend::cpu;
#[cfg(feature = "mlx")]
use bombus::backend::mlx;
use bombus::config::Config;
use bombus::engine::scheduler::Limits;
use bombus::engine::{Engine, Fault, Step};
#[cfg(not(feature = "mlx"))]
use bombus::error::Error;
use bombus::error::{Result, catch_in};
use bombus::runtime::abandon::Abandoned;
use bombus::spec::Quantization;
use rustler::{
    Atom, Encoder, Env, LocalPid, Monitor, NifMap, NifUnitEnum, Resource, ResourceArc, Term,
};
use std::path::PathBuf;

pub struct ModelHandle(pub Engine);

#[rustler::resource_impl]
impl Resource for ModelHandle {}

#[derive(NifUnitEnum)]
pub enum DeviceOption {
    Auto,
    Gpu,
    Cpu,
    MlxCpu,
}

#[derive(NifMap)]
struct LoadOptions {
    device: DeviceOption,
    /// of the CPU backend
    threads: Option<usize>,
    /// bits and group size, for a dense checkpoint
    quantization: Option<(usize, usize)>,
    limits: LimitOptions,
}

/// What is not given is as in `Limits`.
#[derive(NifMap)]
pub struct LimitOptions {
    max_batch_size: Option<usize>,
    max_queue: Option<usize>,
    prefill_chunk: Option<usize>,
    max_context: Option<usize>,
    prefix_cache: Option<usize>,
}

impl LimitOptions {
    fn of_model(&self, device: Device) -> Limits {
        self.over(Limits { prefill_chunk: device.prefill_chunk(), ..Limits::default() })
    }

    /// Those of some requests, within the model's.
    pub fn of_group(&self) -> Limits {
        let none = usize::MAX;
        self.over(Limits {
            max_batch_size: none,
            max_queue: none,
            prefill_chunk: none,
            ..Limits::default()
        })
    }

    fn over(&self, default: Limits) -> Limits {
        Limits {
            max_batch_size: self.max_batch_size.unwrap_or(default.max_batch_size),
            max_queue: self.max_queue.unwrap_or(default.max_queue),
            prefill_chunk: self.prefill_chunk.unwrap_or(default.prefill_chunk),
            max_context: self.max_context,
            prefix_cache: self.prefix_cache.unwrap_or(default.prefix_cache),
        }
    }
}

/// What Elixir shows of a model.
#[derive(NifMap)]
struct Spec {
    family: String,
    layers: usize,
    context: usize,
    hidden_size: usize,
    vocab_size: usize,
    quantization: Option<QuantizationSpec>,
    /// The device that was taken.
    device: DeviceOption,
    max_batch_size: usize,
    /// `generation_config.json`
    generation_config: String,
    /// What of the configuration is not followed.
    warnings: Vec<String>,
    /// Why steps go layer by layer where a card has a fused kernel.
    fallback: Option<String>,
}

#[derive(NifMap)]
struct QuantizationSpec {
    bits: usize,
    group_size: usize,
    mode: Atom,
    overrides: Vec<(String, Option<(usize, usize)>)>,
}

mod atoms {
    rustler::atoms! { affine }
}

/// A load under way.
struct LoadHandle(Abandoned);

#[rustler::resource_impl]
impl Resource for LoadHandle {
    const IMPLEMENTS_DOWN: bool = true;

    /// The caller is dead: nobody else waits for the model.
    fn down<'a>(&'a self, _env: Env<'a>, _pid: LocalPid, _monitor: Monitor) {
        self.0.set();
    }
}

/// `{:ok, load}` at once; then answers `{reference, {:ok, {handle, spec}} | {:error, {reason, message}}}`.
/// The load ends with the caller.
#[rustler::nif]
fn load_model<'a>(
    env: Env<'a>,
    path: String,
    options: LoadOptions,
    reference: Term<'a>,
) -> Term<'a> {
    let abandoned = Abandoned::default();
    let load = ResourceArc::new(LoadHandle(abandoned.clone()));
    env.monitor(&load, &env.pid());
    let work = move || {
        let device = options.device.device(options.threads)?;
        let layout =
            options.quantization.map(|(bits, group_size)| Quantization { group_size, bits });
        let limits = options.limits.of_model(device);
        let max_batch_size = limits.max_batch_size;
        let engine = Engine::load_quantized(&PathBuf::from(path), layout, device, limits)?;
        let spec = spec(&engine, device, max_batch_size);
        Ok((ResourceArc::new(ModelHandle(engine)), spec))
    };
    let started = Address::caller(env, reference).answer_later(move || abandoned.scope(work));
    result_term(env, &started.map(|()| load))
}

impl DeviceOption {
    /// The option that names a device.
    pub fn of(device: Device) -> Self {
        match device {
            Device::Cpu(_) => DeviceOption::Cpu,
            #[cfg(feature = "mlx")]
            Device::Mlx(mlx::Device::Gpu) => DeviceOption::Gpu,
            #[cfg(feature = "mlx")]
            Device::Mlx(mlx::Device::Cpu) => DeviceOption::MlxCpu,
        }
    }

    /// `threads`: of the CPU backend, where not all cores
    #[cfg(feature = "mlx")]
    pub fn device(&self, threads: Option<usize>) -> Result<Device> {
        Ok(match self {
            DeviceOption::Gpu => Device::Mlx(mlx::Device::Gpu),
            DeviceOption::MlxCpu => Device::Mlx(mlx::Device::Cpu),
            DeviceOption::Auto if mlx::gpu_available() => Device::Mlx(mlx::Device::Gpu),
            DeviceOption::Auto | DeviceOption::Cpu => cpu(threads),
        })
    }

    #[cfg(not(feature = "mlx"))]
    pub fn device(&self, threads: Option<usize>) -> Result<Device> {
        match self {
            DeviceOption::Gpu => Err(Error::NoGpu(no_mlx())),
            DeviceOption::MlxCpu => Err(Error::Unsupported(no_mlx())),
            DeviceOption::Auto | DeviceOption::Cpu => Ok(cpu(threads)),
        }
    }
}

fn cpu(threads: Option<usize>) -> Device {
    let default = cpu::Options::default();
    Device::Cpu(cpu::Options { threads: threads.unwrap_or(default.threads), ..default })
}

#[cfg(not(feature = "mlx"))]
fn no_mlx() -> String {
    let install = bombus::error::INSTALL_CUDA_BUILD;
    format!(
        "this build of Bombus has no MLX: on Linux, for an NVIDIA card, install its CUDA build in a \
         folder ({install}), name the folder by BOMBUS_MLX_DIR or `config :bombus, mlx_dir: \"...\"`, \
         and compile again; `device: :cpu` works everywhere"
    )
}

/// Answers `{reference, {:ok, :ok} | {:error, {reason, message}}}`.
#[rustler::nif]
fn save_model<'a>(
    env: Env<'a>,
    model: ResourceArc<ModelHandle>,
    path: String,
    overwrite: bool,
    reference: Term<'a>,
) -> Term<'a> {
    answer_later(env, reference, move || {
        let what = format!("saving to `{path}`");
        catch_in(&what, || model.0.save(&PathBuf::from(path), overwrite))?;
        Ok(rustler::types::atom::ok())
    })
}

/// Every `model_type` that is loaded.
#[rustler::nif]
fn families() -> Vec<&'static str> {
    bombus::arch::families()
}

/// How many requests run together, and how many more wait.
#[rustler::nif]
fn requests(model: ResourceArc<ModelHandle>) -> (usize, usize) {
    model.0.requests()
}

/// Answers `{reference, {:ok, :ok}}` when the model's memory is given back: requests that run or wait end
/// first, or are cancelled.
#[rustler::nif]
fn unload_model<'a>(
    env: Env<'a>,
    model: ResourceArc<ModelHandle>,
    cancel: bool,
    reference: Term<'a>,
) -> Term<'a> {
    let address = Address::caller(env, reference);
    model.0.unload(cancel, move || address.tell_ok());
    result_term(env, &Ok(rustler::types::atom::ok()))
}

/// A step, as Elixir hears of it; the duration in nanoseconds.
#[derive(NifMap)]
struct StepTerm {
    batch_size: usize,
    rows: usize,
    queue: usize,
    kv_bytes: usize,
    prefix_cache_bytes: usize,
    duration: u64,
}

/// Sends `{reference, step}` to the process after every step, as long as it lives.
#[rustler::nif]
fn watch(model: ResourceArc<ModelHandle>, pid: LocalPid, reference: Term) -> Atom {
    let address = Address::new(pid, reference);
    model.0.watch(Box::new(move |step: Step| {
        let term = StepTerm {
            batch_size: step.sequences,
            rows: step.rows,
            queue: step.waiting,
            kv_bytes: step.kv_bytes,
            prefix_cache_bytes: step.prefix_bytes,
            duration: step.duration.as_nanos() as u64,
        };
        address.send(|env| term.encode(env))
    }));
    rustler::types::atom::ok()
}

#[derive(NifUnitEnum)]
enum FaultOption {
    Panic,
    Error,
}

/// For tests: the model's next step fails.
#[rustler::nif]
fn fail_next_step(model: ResourceArc<ModelHandle>, fault: FaultOption) -> Atom {
    model.0.fail_next_step(match fault {
        FaultOption::Panic => Fault::Panic,
        FaultOption::Error => Fault::Error,
    });
    rustler::types::atom::ok()
}

fn spec(engine: &Engine, device: Device, max_batch_size: usize) -> Spec {
    let config = engine.config();
    Spec {
        family: config.model_type.clone(),
        layers: config.spec.layers.len(),
        context: engine.context(),
        hidden_size: config.spec.hidden,
        vocab_size: config.spec.vocab,
        quantization: engine.quantization().map(|default| quantization_spec(config, default)),
        device: DeviceOption::of(device),
        max_batch_size,
        generation_config: serde_json::Value::Object(config.generation.clone()).to_string(),
        warnings: config.warnings.clone(),
        fallback: engine.fallback().map(str::to_owned),
    }
}

fn quantization_spec(config: &Config, default: Quantization) -> QuantizationSpec {
    let pair = |own: &Quantization| (own.bits, own.group_size);
    let overrides = config.overrides.iter();
    QuantizationSpec {
        bits: default.bits,
        group_size: default.group_size,
        mode: atoms::affine(),
        overrides: overrides.map(|(path, own)| (path.clone(), own.as_ref().map(pair))).collect(),
    }
}
