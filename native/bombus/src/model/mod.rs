//! A loaded model: from files to a decoder, its adapters, and what runs it.

pub mod adapter;
pub mod convert;
pub mod decoder;
pub mod executor;
pub mod info;
pub mod weights;
