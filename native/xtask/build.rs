fn main() {
    // The only place where cargo says for which target it builds.
    println!("cargo:rustc-env=XTASK_TARGET={}", std::env::var("TARGET").unwrap_or_default());
}
