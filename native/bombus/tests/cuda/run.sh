#!/bin/sh
# Builds the kernel for steps for the emulator and runs it on small models of several shapes: one line for each. Then
# the kernels for attention of a prompt's rows.
#
# run.sh [NAME]: which model, else all (seven minutes).
# BLOCKS, SEEDS, ROWS: how many, else what is said below; CUDA: where step.rs and the kernel's sources are; BUILD: a
# folder to build in; CXX, RUSTC: the compilers.
set -u
here=$(cd "$(dirname "$0")" && pwd)
cuda=$(cd "${CUDA:-$here/../../src/backend/cuda}" && pwd) || exit 1
build=${BUILD:-$(mktemp -d)}
[ -n "${BUILD:-}" ] || trap 'rm -rf "$build"' EXIT
mkdir -p "$build"
failed=0

# What Rust and the kernel both know: printed by the module that the engine prints it with.
"${RUSTC:-rustc}" --edition 2024 -o "$build/layout" "$here/layout.rs" || exit 1

# The sources in the order of step.rs; primitives.cuh and barriers.cuh are the emulator's.
{
  echo '#include "numbers.cuh"'
  echo '#include "layout.inc"'
  sed -n 's/.*include_str!("\(step\/.*\.cuh\)").*/#include "\1"/p' "$cuda/step.rs"
  echo 'inline void launch(const unsigned long long* table, const unsigned long long* plan,'
  echo '                   const unsigned* sampled, const unsigned* workspace, float* logits) {'
  echo '#include "step/launch.cu"'
  echo '}'
} > "$build/kernel.inc"

# NAME HIDDEN INNER HEADS KV_HEADS DIM LAYERS VOCAB BLOCKS ROWS..., with the `flags` of layout.rs that are set before
model() {
  name=$1 hidden=$2 inner=$3 heads=$4 kv=$5 dim=$6 layers=$7 vocab=$8 blocks=$9
  shift 9
  case ${only:-$name} in "$name") ;; *) return ;; esac
  printf '%s: ' "$name"
  began=$(date +%s)
  "$build/layout" "$hidden" "$inner" "$heads" "$kv" "$dim" "$layers" "$vocab" $flags \
    > "$build/layout.inc"
  # Variables that nothing is written to have numbers that show.
  ${CXX:-g++} -std=c++20 -O2 -fno-strict-aliasing -ftrivial-auto-var-init=pattern -Wno-unknown-pragmas \
    -Wno-enum-compare -I"$build" -I"$cuda" \
    -o "$build/$name" "$here/step_test.cpp" || {
    failed=1
    echo "did not compile"
    return
  }
  built=$(date +%s)
  "$build/$name" "${BLOCKS:-$blocks}" "${SEEDS:-2}" ${ROWS:-"$@"} || failed=1
  echo "  ($((built - began)) s to build, $(($(date +%s) - built)) s to run)"
}

only=${1:-}
flags="qk_norm"
model small    256  768 4 2  64 3 320 5 1 9 8 12 2 40 5
model odd      320  832 6 2  64 2 330 7 5 12 1 33 6
model wide    1024 3072 8 1 128 2 328 7 8 9 2 40
model chunks  1280 5376 2 2 128 2  72 5 1 3 10
# More blocks than there are units of outputs.
model many     256  512 2 2  64 2 100 45 1 3 10
# As Qwen2 and Llama 3 have it.
flags="qkv_bias scaled"
model bias     256  768 4 2  64 3 320 5 1 9 8 40
model yarn    1024 1536 8 2 128 2 328 7 3 10
# As Granite has it.
flags="factors"
model factors  256  768 4 2  64 3 320 5 1 3 10
# As SmolLM3 has it.
flags="unrotated"
model unrotated 256 768 4 2  64 3 320 5 1 3 10
# Of Mistral all layers have a window, of others some.
flags="windowed"
model windowed 256  768 4 2  64 3 320 5 1 3 10
flags="mixed unrotated"
model mixed    256  768 4 2  64 3 320 5 1 3 10
# As Ministral 3 has it.
flags="scaled growing"
model growing  256  768 4 2  64 3 320 5 1 3 10
# As Llama may have it, and ERNIE.
flags="qkv_bias o_bias factors"
model bias_of_o 256 768 4 2  64 3 320 5 1 3 10
flags="qkv_bias o_bias mlp_bias"
model biases   256  768 4 2  64 3 320 5 1 3 10
# As Gemma 3 has it.
flags="qk_norm gelu post_norms rotations mixed"
model gemma    256  768 4 2  64 3 320 5 1 9 8 40
model gemma256 256  768 2 1 256 2 200 5 1 3 10
# All at once, but for norms behind; and with them.
flags="qkv_bias o_bias mlp_bias factors scaled growing windowed"
model all      256  768 4 2  64 2 320 5 1 3 10
flags="qkv_bias o_bias mlp_bias gelu post_norms factors windowed"
model branch   256  768 4 2  64 2 320 5 1 3 10
# prefill DIM: attention of the rows of prompts, for heads of so many numbers.
prefill() {
  name=prefill$1
  case ${only:-$name} in "$name") ;; *) return ;; esac
  ${CXX:-g++} -std=c++20 -O2 -fno-strict-aliasing -Wno-unknown-pragmas -DHEAD_DIM="$1" -I"$cuda" \
    -o "$build/$name" "$here/prefill_test.cpp" && "$build/$name" || failed=1
}
prefill 64
prefill 128
prefill 256
exit $failed
