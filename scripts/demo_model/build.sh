#!/bin/sh
# Makes priv/models from nothing. Two Python environments are needed:
#   TORCH_PYTHON  torch, transformers, tokenizers, safetensors; best on a machine with a GPU (about 4 minutes on an H200, many hours on a CPU)
#   MLX_PYTHON    mlx 0.32 and mlx-lm 0.32, by an absolute path; a CPU is enough (about 20 minutes an adapter)
# and mix, in the environment of `. .toolchain/env`.
# Intermediate files go to build/ beside this script. To train on another machine, run the steps marked "torch" there and
# copy build/tokenizer and build/hf back.
set -eu
cd "$(dirname "$0")"
TORCH_PYTHON=${TORCH_PYTHON:-python3}
MLX_PYTHON=${MLX_PYTHON:-python3}
models=../../priv/models

# torch: the tokenizer, then the model
"$TORCH_PYTHON" tokenizer.py build/tokenizer
"$TORCH_PYTHON" train.py build/tokenizer build/hf

# mlx-lm: 4 bits, groups of 64, bfloat16 scales
rm -rf build/mlx build/dense
"$MLX_PYTHON" -m mlx_lm convert --hf-path build/hf --mlx-path build/mlx -q --q-bits 4 --q-group-size 64 --dtype bfloat16
"$MLX_PYTHON" finish.py model $models/demo build/mlx build/tokenizer

# mix bombus.train: the adapters. They are trained on the 4-bit model's own values written out as dense float32: on MLX's
# CPU backend float32 is about ten times as fast as bfloat16, and dense is faster than quantized.
"$MLX_PYTHON" -m mlx_lm convert --hf-path build/mlx --mlx-path build/dense --dequantize --dtype float32
cp build/tokenizer/* build/dense/
here=$PWD
for voice in pirate news; do
  "$MLX_PYTHON" corpus.py build/data/$voice $voice 4000
  (cd ../.. && mix bombus.train --python "$MLX_PYTHON" --model "$here/build/dense" --data "$here/build/data/$voice" \
    --output "$here/build/adapters/$voice" --iterations 300 --batch-size 8 --grad-accumulation 1 --learning-rate 1.0e-4 \
    --max-seq-length 512 --seed 1 --save-every 50 --steps-per-eval 1000)
  "$MLX_PYTHON" finish.py adapter $models/adapters/$voice build/adapters/$voice
done

"$MLX_PYTHON" check.py $models
