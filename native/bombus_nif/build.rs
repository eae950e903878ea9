//! Beside the NIF lies MLX in its wheel's layout, also after a release was moved.

fn main() {
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-rpath,$ORIGIN/mlx/lib");
    }
}
