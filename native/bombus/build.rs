//! Where the tests and examples find libmlx.so (the NIF has a path of its own).

fn main() {
    println!("cargo:rerun-if-env-changed=BOMBUS_MLX_DIR");
    let mlx = std::env::var("BOMBUS_MLX_DIR");
    if let (Ok(mlx), Ok(_)) = (mlx, std::env::var("CARGO_FEATURE_MLX")) {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{mlx}/mlx/lib");
    }
}
