# make demo: the model that ships with Bombus writes posts, without and with an adapter.
# make demo MODEL=smollm2: a real one, which is fetched once (93 MB), answers and writes a story.
# make test: all tests. All set up what they need in .toolchain first.
# make soak: hundreds of callers for MINUTES (5), to see that nothing leaks.
# make fuzz: mutated files for MINUTES (5), to see that nothing crashes or hangs; needs cargo alone.
# make bench: the engine's speed on this machine; needs cargo alone. bench/README.md

SHELL := /bin/sh
in_toolchain := . .toolchain/env &&
mlx_c := native/target/mlx-c/config.toml

.PHONY: demo test bench soak fuzz setup test-rust test-fuzz test-elixir lint format clean

demo: setup
ifdef MODEL
	@sh scripts/real_model.sh $(MODEL)
	@$(in_toolchain) mix run scripts/demo_$(MODEL).exs
else
	@$(in_toolchain) mix run scripts/demo.exs
endif

test: lint test-rust test-fuzz test-elixir

setup:
	@sh scripts/setup.sh

# The engine and the NIF in one call: cargo then builds their common dependencies once. On Linux
# the first Elixir compilation makes MLX's C layer.
test-rust: compile
	$(in_toolchain) cd native && cargo test --release -p bombus -p bombus_nif -p bombus_jinja $(cargo_config)

# A minute on one core; always the same inputs. Cargo has built it with the tests.
test-fuzz: test-rust
	native/target/release/examples/fuzz --minutes 1

# Without a network the tests of what is fetched are skipped, and say so.
test-elixir: compile
	@sh scripts/real_model.sh || echo 'make test: goes on without the real model'
	@$(in_toolchain) $$BOMBUS_PYTHON scripts/published_tokenizers.py || echo 'make test: goes on without those tokenizers'
	$(in_toolchain) mix test

.PHONY: compile
compile: setup
	@$(in_toolchain) MIX_ENV=test mix compile --warnings-as-errors

# ARGS="--batch 1,8 ..."; --help shows all
bench:
	cd native && cargo run --release -p bombus --example bench -- $(ARGS)

MINUTES ?= 5
soak: setup
	@$(in_toolchain) RUST_BACKTRACE=0 mix run scripts/soak.exs $(MINUTES)

# ARGS="--only config --seed 7 ..."; --help shows all
fuzz:
	cd native && cargo run --release -p bombus --example fuzz -- --minutes $(MINUTES) $(ARGS)

lint: compile
	$(in_toolchain) mix format --check-formatted
	$(in_toolchain) cd native && cargo fmt --all --check
	$(in_toolchain) cd native && cargo clippy --release --all-targets --quiet $(cargo_config) -- -D warnings
	$(in_toolchain) cd native && cargo clippy --release --quiet -p bombus -p bombus_nif -p bombus_jinja -- -D warnings

ifneq ($(shell uname),Darwin)
mlx_c_config := --config $(CURDIR)/$(mlx_c)
endif
cargo_config := --features bombus/mlx,bombus_nif/mlx $(mlx_c_config)

format: setup
	$(in_toolchain) mix format && cd native && cargo fmt --all

clean:
	rm -rf _build priv/native native/target
