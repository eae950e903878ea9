//! Prints what Rust and the fused kernel both know, for a model of the emulator: `run.sh` compiles this.
//!
//! layout HIDDEN INNER HEADS KV_HEADS DIM LAYERS VOCAB QK_NORM QKV_BIAS SCALED

#![allow(dead_code)]

#[path = "../../src/backend/cuda/layout.rs"]
mod layout;

fn main() {
    let numbers: Vec<usize> =
        std::env::args().skip(1).map(|number| number.parse().expect("a number")).collect();
    let [hidden, inner, heads, kv_heads, dim, layers, vocab, norm, bias, scaled] = numbers[..] else {
        panic!("expected ten numbers, got: {numbers:?}");
    };
    let shape = layout::Shape {
        hidden,
        inner,
        heads,
        kv_heads,
        dim,
        layers,
        vocab,
        eps: 1e-6,
        theta: 1e6,
        qk_norm: norm == 1,
        qkv_bias: bias == 1,
        scaled: scaled == 1,
    };
    print!("{}", layout::header(&shape));
}
