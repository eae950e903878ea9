//! Builds MLX's C layer on Linux, where mlx-sys's own build script cannot.
//!
//! `cargo run -p xtask -- mlx-c --mlx DIR --out DIR`: DIR is an unpacked MLX wheel (it holds
//! `mlx/lib/libmlx.so` and `mlx/include`). Makes `libmlxc.a` and `bindings.rs` from the sources
//! in the mlx-sys crate, and `config.toml`, which overrides that crate's build script:
//! `cargo build --config OUT/config.toml`. Run again, it does nothing.

mod mlx_c;

use anyhow::{Result, bail};
use std::path::PathBuf;

const USAGE: &str = "usage: cargo run -p xtask -- mlx-c --mlx DIR --out DIR";

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words[..] {
        ["mlx-c", "--mlx", mlx, "--out", out] => {
            mlx_c::build(&PathBuf::from(mlx), &PathBuf::from(out))
        }
        _ => bail!("{USAGE}"),
    }
}
