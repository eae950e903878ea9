//! The boundary between the engine and the BEAM: handles, options and messages.
//!
//! Every function here returns at once. What takes time happens on the engine's thread or on one
//! of its own, and comes back as a message `{reference, answer}` to the caller. Handles are
//! resources; dropping one only sends a command.

mod adapter;
mod answer;
mod embedding;
mod generation;
mod group;
mod held;
mod hub;
mod info;
mod memory;
mod model;
mod quantization;
mod tensors;
mod tokenizer;

// The module that `Bombus.Native.Library` makes.
rustler::init!("bombus_nif");
