//! libmlxc.a, bindings.rs and the cargo config that puts them in place of mlx-sys's build script.

use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;

const TARGET: &str = env!("XTASK_TARGET");
const FORMAT_SHIM: &str = include_str!("../cpp/format_shim.h");
const HALF_ACCESSORS: &str = include_str!("../cpp/half_accessors.cpp");

/// What bindgen does not see on x86-64, as mlx-rs expects it.
const HALF_BINDINGS: &str = "
#[repr(transparent)] #[derive(Debug, Default, Copy, Clone)] pub struct float16_t(pub u16);
pub type bfloat16_t = u16;
unsafe extern \"C\" {
    pub fn mlx_array_item_float16(res: *mut float16_t, arr: mlx_array) -> ::std::os::raw::c_int;
    pub fn mlx_array_item_bfloat16(res: *mut bfloat16_t, arr: mlx_array) -> ::std::os::raw::c_int;
    pub fn mlx_array_data_float16(arr: mlx_array) -> *const float16_t;
    pub fn mlx_array_data_bfloat16(arr: mlx_array) -> *const bfloat16_t;
}
";

pub fn build(mlx: &Path, out: &Path) -> Result<()> {
    let mlx = mlx.canonicalize().with_context(|| format!("{} does not exist", mlx.display()))?;
    ensure!(
        mlx.join("mlx/lib/libmlx.so").is_file(),
        "{} is no unpacked MLX wheel: mlx/lib/libmlx.so is missing",
        mlx.display()
    );
    fs::create_dir_all(out)?;
    let out = out.canonicalize()?;
    let mlx_c = mlx_c_sources()?;
    let config = cargo_config(&mlx, &out);
    let stamp =
        [config.as_str(), &mlx_c.to_string_lossy(), FORMAT_SHIM, HALF_ACCESSORS, HALF_BINDINGS]
            .concat();
    if fs::read_to_string(out.join("stamp")).is_ok_and(|old| old == stamp) {
        return Ok(());
    }
    eprintln!("building mlx-c for {}", mlx.display());
    bindings(&mlx_c, &out)?;
    compile(&mlx_c, &mlx, &out)?;
    fs::write(out.join("config.toml"), config)?;
    fs::write(out.join("stamp"), stamp)?;
    Ok(())
}

/// The mlx-c sources that the mlx-sys crate carries.
fn mlx_c_sources() -> Result<PathBuf> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml");
    let output = Command::new(std::env::var("CARGO").unwrap_or_else(|_| "cargo".into()))
        .args(["metadata", "--format-version", "1", "--all-features", "--manifest-path"])
        .arg(workspace)
        .output()?;
    ensure!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let package = metadata["packages"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|package| package["name"] == "mlx-sys")
        .context("mlx-sys is not among the dependencies")?;
    let manifest = package["manifest_path"].as_str().context("mlx-sys without a manifest")?;
    let root = Path::new(manifest).parent().context("mlx-sys without a folder")?;
    Ok(root.join("src/mlx-c"))
}

fn compile(mlx_c: &Path, mlx: &Path, out: &Path) -> Result<()> {
    let shim = out.join("format_shim.h");
    let half = out.join("half_accessors.cpp");
    fs::write(&shim, FORMAT_SHIM)?;
    fs::write(&half, HALF_ACCESSORS)?;
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++20")
        .target(TARGET)
        .host(TARGET)
        .out_dir(out)
        .opt_level(2)
        .warnings(false)
        .cargo_metadata(false)
        .include(mlx_c)
        .include(mlx.join("mlx/include"))
        .flag("-include")
        .flag(shim)
        .files(files(&mlx_c.join("mlx/c"), "cpp")?);
    if !arm() {
        build.file(half);
    }
    build.try_compile("mlxc").context("compiling mlx-c")
}

fn bindings(mlx_c: &Path, out: &Path) -> Result<()> {
    let headers = files(&mlx_c.join("mlx/c"), "h")?;
    let mut builder = bindgen::Builder::default()
        .rust_target("1.82.0".parse().map_err(anyhow::Error::msg)?)
        .clang_arg(format!("-I{}", mlx_c.display()))
        .clang_arg(format!("-isystem{}", compiler_headers()?.display()))
        .blocklist_function("malloc")
        .blocklist_function("realloc");
    for header in headers {
        builder = builder.header(header.to_string_lossy());
    }
    // bindgen panics where it cannot load libclang.
    let generated = catch_unwind(AssertUnwindSafe(|| builder.generate()));
    let mut text = generated.ok().context(LIBCLANG)?.context("binding mlx-c")?.to_string();
    if !arm() {
        text.push_str(HALF_BINDINGS);
    }
    fs::write(out.join("bindings.rs"), text)?;
    Ok(())
}

const LIBCLANG: &str =
    "libclang is missing: `apt-get install libclang-dev`, or name its folder in LIBCLANG_PATH";

/// libclang from a wheel comes without stddef.h and its like: gcc's serve.
fn compiler_headers() -> Result<PathBuf> {
    let output =
        Command::new("gcc").arg("-print-file-name=include").output().context("running gcc")?;
    if !output.status.success() {
        bail!("gcc -print-file-name=include: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(PathBuf::from(String::from_utf8(output.stdout)?.trim()))
}

/// The configuration that cargo takes with `--config`: a build-script override, see
/// "Overriding Build Scripts" in the Cargo book.
fn cargo_config(mlx: &Path, out: &Path) -> String {
    format!(
        r#"[target.{TARGET}.mlx]
rustc-link-lib = ["static=mlxc", "dylib=mlx", "dylib=stdc++"]
rustc-link-search = ["native={out}", "native={mlx}/mlx/lib"]
rustc-env = {{ OUT_DIR = "{out}" }}

[env]
BOMBUS_MLX_DIR = "{mlx}"
"#,
        out = out.display(),
        mlx = mlx.display()
    )
}

fn files(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|found| found == extension) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn arm() -> bool {
    TARGET.starts_with("aarch64")
}
