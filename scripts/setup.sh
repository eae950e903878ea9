#!/bin/sh
# Sets up all that Bombus is built with, inside .toolchain, and writes .toolchain/env, which
# exports it. Changes nothing else on the machine. Run again, it does nothing.
#   sh scripts/setup.sh && . .toolchain/env
set -eu
MLX_VERSION=0.32.2
cd "$(dirname "$0")/.."
root=$PWD
tools=$root/.toolchain
case $root in *[[:space:]]*) echo "setup: move this folder to a path without spaces: $root" >&2; exit 1 ;; esac
mkdir -p "$tools"
[ -e "$tools/env" ] || cat <<'END'
setup: the first time takes five to ten minutes on two cores: what Bombus is built with is fetched
setup: into .toolchain (half a gigabyte), then cargo builds the engine. After that, seconds.
END

missing() {
  echo "setup: $1 is missing: $2" >&2
  exit 1
}

need() { command -v "$1" >/dev/null 2>&1 || missing "$1" "$2"; }

rust='install it with rustup, see rustup.rs'
need cargo "$rust"
cargo_minor=$(cargo --version | sed 's/^cargo 1\.\([0-9]*\)\..*/\1/')
[ "$cargo_minor" -ge 91 ] || missing 'cargo 1.91 or newer' 'rustup update stable'

# Elixir: an own one where it is new enough, else a private one.
has_elixir() {
  elixir -e 'unless Version.match?(System.version(), ">= 1.18.0"), do: System.halt(1)' >/dev/null 2>&1
}

# The private one may be on the path already, from .toolchain/env: it does not count.
PATH=$(printf %s "$PATH" | sed "s|$tools/beam/bin:||g")
path=
if [ "$(uname)" = Darwin ]; then
  has_elixir || missing 'Elixir 1.18 or newer' 'brew install elixir'
  need cmake 'brew install cmake'
else
  for command in gcc g++ git make python3; do need $command "apt-get install $command"; done
  if ! has_elixir; then
    need apt-get 'install Elixir 1.18 or newer'
    [ "$(uname -m)" = x86_64 ] || missing 'Elixir 1.18 or newer' 'install it: the private one is for x86-64'
    prefix=$tools/beam
    # The prefix is written into the binaries: a moved checkout needs a new one.
    [ "$(cat "$tools/beam-prefix" 2>/dev/null)" = "$prefix" ] || rm -rf "$prefix"
    if [ ! -d "$prefix" ]; then
      echo 'setup: Elixir 1.18 into .toolchain/beam'
      sh scripts/beam.sh "$prefix" || { rm -rf "$prefix"; exit 1; }
      echo "$prefix" > "$tools/beam-prefix"
    fi
    path=$prefix/bin
  fi
fi

# MLX: the wheel that BOMBUS_MLX_DIR names, else the one for CPUs.
mlx=
if [ "$(uname)" != Darwin ]; then
  wheel=$tools/mlx-$MLX_VERSION
  pip='python3 -m pip --disable-pip-version-check -q'
  $pip --version >/dev/null 2>&1 || missing pip 'apt-get install python3-pip'
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  mlx=${BOMBUS_MLX_DIR:-$wheel}
  if [ "$mlx" != "$wheel" ]; then
    [ -e "$mlx/mlx/lib/libmlx.so" ] ||
      missing "MLX in BOMBUS_MLX_DIR=$mlx" 'name the folder of an unpacked wheel, or unset it'
    mlx=$(cd "$mlx" && pwd)
  elif [ ! -e "$wheel/mlx/lib/libmlx.so" ]; then
    echo "setup: MLX $MLX_VERSION into .toolchain"
    $pip download --no-deps -d "$work" "mlx-cpu==$MLX_VERSION"
    python3 -m zipfile -e "$work"/mlx_cpu-*.whl "$work/mlx"
    rm -rf "$wheel"
    mv "$work/mlx" "$wheel"
  fi
  # bindgen needs it, once, for MLX's C layer.
  if [ ! -e "$tools/libclang/libclang.so" ]; then
    echo 'setup: libclang into .toolchain'
    $pip download --no-deps -d "$work" libclang
    python3 -m zipfile -e "$work"/libclang-*.whl "$work/clang"
    mkdir -p "$tools/libclang"
    find "$work/clang" -name libclang.so -exec mv {} "$tools/libclang/" \;
  fi
fi

# A Python with mlx_lm, for training: the one that BOMBUS_PYTHON names, else one of its own.
python=${BOMBUS_PYTHON:-$tools/python/bin/python}
if [ ! -x "$python" ]; then
  [ -z "${BOMBUS_PYTHON:-}" ] || missing "the Python in BOMBUS_PYTHON=$BOMBUS_PYTHON" 'name one that has mlx_lm, or unset it'
  need python3 'install Python 3.10 or newer'
  echo "setup: mlx_lm $MLX_VERSION into .toolchain/python"
  # Made beside its place, a virtual environment would name the wrong one.
  rm -rf "$tools/python"
  python3 -m venv "$tools/python" || missing 'venv' 'apt-get install python3-venv'
  extra=; [ "$(uname)" = Darwin ] || extra='[cpu]'
  "$tools/python/bin/python" -m pip --disable-pip-version-check -q install "mlx$extra==$MLX_VERSION" "mlx-lm==$MLX_VERSION" ||
    { rm -rf "$tools/python"; exit 1; }
fi

{
  echo "# Written by scripts/setup.sh: what Bombus is built and run with."
  [ -z "$path" ] || echo "case \$PATH in '$path':*) ;; *) export PATH='$path':\"\$PATH\" ;; esac"
  echo "export BOMBUS_PYTHON='$python'"
  [ -z "$mlx" ] || echo "export BOMBUS_MLX_DIR='$mlx' LIBCLANG_PATH='$tools/libclang'"
} > "$tools/env.new"
mv "$tools/env.new" "$tools/env"

# Where Hex is installed, mix.exs names Nx and telemetry, for the tests that need them. In this folder
# Mix would compile all of Bombus to answer that, and say nothing of it.
has_hex() (
  . "$tools/env"
  cd "$tools"
  mix run --no-mix-exs -e 'Code.ensure_loaded?(Hex) || System.halt(1)' >/dev/null 2>&1
)
if [ ! -d deps/nx ] && has_hex; then
  (. "$tools/env" && mix deps.get)
fi
