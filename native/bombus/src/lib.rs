//! The engine of Bombus: quantized decoder-only transformers with LoRA adapters.
//!
//! In the order in which data flows; each module may use those above it: work that nobody waits for
//! any more (`abandon`), files that are read whole (`files`), a checkpoint's files (`mapped_file`,
//! `tensor_file`, `config`), where they come from (`hub`), where its tensors belong (`modules`), text
//! (`tokenizer`), what a token is drawn with (`sampler`), the operations (`backend`), the transformer
//! over them (`decoder`), adapters (`adapter`), from files to a decoder (`checkpoint`), one request
//! (`sequence`), which rows go into a step (`scheduler`), and the thread that runs them (`engine`).
//! Beside all that, matrices of a caller's own (`quantization`), and checkpoints made of others
//! (`convert`).

pub mod abandon;
pub mod adapter;
pub mod arch;
pub mod backend;
pub mod checkpoint;
pub mod config;
pub mod convert;
pub mod decoder;
pub mod engine;
pub mod error;
pub mod executor;
pub mod files;
pub mod gauge;
pub mod hub;
pub mod mapped_file;
pub mod memory;
pub mod quantization;
pub mod sampler;
pub mod scheduler;
pub mod sequence;
pub mod spec;
pub mod tensor_file;
pub mod tokenizer;
