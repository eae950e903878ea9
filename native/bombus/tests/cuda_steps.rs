//! The kernel for steps on NVIDIA cards, on this machine's processor: beside the definition of the model, with
//! adapters of several ranks, in several orders of its threads, which must all give the same bits. See
//! `cuda/emulator.hpp`; `sh cuda/run.sh` runs more.
//!
//! It needs g++, as MLX's C layer does.

#![cfg(all(feature = "mlx", target_os = "linux", target_arch = "x86_64"))]
#![allow(clippy::unwrap_used)]

use std::process::Command;

fn steps_are_right(model: &str, rows: &str) {
    run(model, rows, " launches, ");
}

fn run(model: &str, rows: &str, expected: &str) {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cuda/run.sh");
    let output = Command::new("sh").args([script, model]).env("ROWS", rows).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    println!("{said}");
    assert!(said.contains(expected), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn one_row_and_a_tile_of_them() {
    steps_are_right("odd", "1 5");
}

#[test]
fn biases_without_norms_of_heads_and_a_table_of_frequencies() {
    steps_are_right("bias", "3 10");
}

#[test]
fn several_tiles() {
    steps_are_right("small", "10 33");
}

#[test]
fn biases_of_all_products_factors_growing_queries_and_a_window() {
    steps_are_right("all", "1 10");
}

#[test]
fn layers_without_a_window_or_a_rotation_beside_others() {
    steps_are_right("mixed", "3 10");
}

#[test]
fn norms_behind_gelu_and_two_rotations() {
    steps_are_right("gemma", "1 10");
}

#[test]
fn heads_of_256_numbers() {
    steps_are_right("gemma256", "3 10");
}

#[test]
fn rows_of_prompts_with_windows_and_without() {
    run("prefill64", "", "window of 100, ");
    run("prefill256", "", "window of 100, ");
}
