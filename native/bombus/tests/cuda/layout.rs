//! Prints what Rust and the fused kernel both know, for a model of the emulator: `run.sh` compiles this.
//!
//! layout HIDDEN INNER HEADS KV_HEADS DIM LAYERS VOCAB FLAGS...: a flag is the name of what a model has
//! besides.

#![allow(dead_code)]

#[path = "../../src/backend/cuda/layout.rs"]
mod layout;

use layout::{Factors, Shape};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (numbers, flags) = arguments.split_at(7.min(arguments.len()));
    let numbers: Vec<usize> =
        numbers.iter().map(|number| number.parse().expect("a number")).collect();
    let [hidden, inner, heads, kv_heads, dim, layers, vocab] = numbers[..] else {
        panic!("expected seven numbers, got: {numbers:?}");
    };
    let mut shape = Shape {
        hidden,
        inner,
        heads,
        kv_heads,
        dim,
        layers,
        vocab,
        eps: 1e-6,
        theta: 1e6,
        qk_norm: false,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        scaled: false,
        rotations: 1,
        unrotated: false,
        window: 0,
        query_beta: 0.0,
        query_context: 1,
        gelu: false,
        post_norms: false,
        factors: Factors::NONE,
    };
    flags.iter().for_each(|flag| set(&mut shape, flag));
    print!("{}", layout::header(&shape));
    // Whether every other layer sees everything.
    println!("constexpr bool O_BIAS = {}, MLP_BIAS = {};", shape.o_bias, shape.mlp_bias);
    println!("constexpr bool SOME_FULL = {};", flags.iter().any(|flag| flag == "mixed"));
}

fn set(shape: &mut Shape, flag: &str) {
    match flag {
        "qk_norm" => shape.qk_norm = true,
        "qkv_bias" => shape.qkv_bias = true,
        "o_bias" => shape.o_bias = true,
        "mlp_bias" => shape.mlp_bias = true,
        "scaled" => shape.scaled = true,
        "unrotated" => shape.unrotated = true,
        // Neither of whole pages, nor less than one.
        "windowed" | "mixed" => shape.window = 100,
        "growing" => (shape.query_beta, shape.query_context) = (0.25, 48),
        "gelu" => shape.gelu = true,
        "post_norms" => shape.post_norms = true,
        "rotations" => (shape.rotations, shape.scaled) = (2, true),
        "factors" => {
            let scores = Some(0.09);
            shape.factors = Factors { embedding: 1.5, residual: 0.4, logits: 0.125, scores };
        }
        flag => panic!("unknown flag: {flag}"),
    }
}
