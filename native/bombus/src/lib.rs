//! The engine of Bombus: quantized decoder-only transformers with LoRA adapters.
//!
//! Nothing points back: each of these modules uses only those above it, which `tests/layers.rs` checks.
//!
//! - `error`: what can go wrong, and where panics end
//! - `runtime`: threads, the end of the process, memory that is left, metrics, abandoned work
//! - `files`: files that are read whole, mapped tensors, new files
//! - `hub`: where repositories come from
//! - `tokenizer`: text to ids and back, chat templates
//! - `grammar`: texts that keep to a format
//! - `sampler`: what a token is drawn with
//! - `spec`: a model as a value
//! - `arch`: the families, each from `config.json` to a `ModelSpec`
//! - `config`: what else a checkpoint's configuration says
//! - `quant`: matrices in memory
//! - `backend`: the operations of a step, and what goes into one
//! - `backend::cpu`: in Rust, for plain CPUs
//! - `backend::arrays`: between bytes and MLX's arrays
//! - `backend::cuda`: kernels for NVIDIA cards
//! - `backend::mlx`: on MLX
//! - `backend::device`: which of them
//! - `quantization`: matrices of a caller's own, on any device
//! - `model::convert`: checkpoints made of others
//! - `model::decoder`: the transformer over the operations
//! - `model::weights`: from files to a decoder
//! - `model::adapter`: LoRA and DoRA
//! - `model::executor`: what runs a model's steps
//! - `model::info`: what a model is, without its weights
//! - `engine`: requests, the scheduler, and the thread that runs a model

pub mod arch;
pub mod backend;
pub mod config;
pub mod engine;
pub mod error;
pub mod files;
pub mod grammar;
pub mod hub;
pub mod model;
pub mod quant;
pub mod quantization;
pub mod runtime;
pub mod sampler;
pub mod spec;
pub mod tokenizer;
