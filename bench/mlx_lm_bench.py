"""mlx-lm's speed on a checkpoint of Qwen3's shape, for the benchmark:

    python mlx_lm_bench.py CHECKPOINT PROMPT,... DEPTH,... BATCH,... TOKENS ROUNDS

Prints one object: what -> tokens/s, and each as it comes on standard error; on the device that MLX takes by
itself. It needs mlx and mlx-lm's models, no tokenizer. The steps are those of mlx-lm's `generate_step`: greedy,
and the next is submitted before the last is read; a prompt goes in pieces of 2048.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3
from mlx_lm.models.cache import KVCache

PIECE = 2048


def load(folder):
    config = json.loads((folder / "config.json").read_text())
    model = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    weights = model.sanitize(mx.load(str(folder / "model.safetensors")))
    layout = {"group_size": config["quantization"]["group_size"], "bits": config["quantization"]["bits"]}
    nn.quantize(model, **layout, class_predicate=lambda path, _: f"{path}.scales" in weights)
    model.load_weights(list(weights.items()))
    mx.eval(model.parameters())
    return model


def prefill(model, rows, length):
    """The caches and the first token of so many equal prompts."""
    prompt = mx.array([[(place * 7919 + 11) % 2000 for place in range(length)]] * rows)
    cache = [KVCache() for _ in model.layers]
    while prompt.shape[1] > 1:
        piece = min(PIECE, prompt.shape[1] - 1)
        model(prompt[:, :piece], cache=cache)
        mx.eval([layer.state for layer in cache])
        prompt = prompt[:, piece:]
    token = model(prompt, cache=cache)[:, -1].argmax(-1)
    mx.eval(token)
    return cache, token


def decode(model, rows, depth, tokens):
    cache, token = prefill(model, rows, depth)
    start = time.perf_counter()
    for _ in range(tokens):
        following = model(token[:, None], cache=cache)[:, -1].argmax(-1)
        mx.async_eval(following)
        token.tolist()
        token = following
    token.tolist()
    return rows * tokens / (time.perf_counter() - start)


def speed(measure, rounds):
    # The first round compiles.
    return statistics.median([measure() for _ in range(1 + rounds)][1:])


def prefill_speed(model, length):
    start = time.perf_counter()
    prefill(model, 1, length)
    return length / (time.perf_counter() - start)


def main():
    folder, *sizes, tokens, rounds = sys.argv[1:]
    prompts, depths, batches = ([int(size) for size in each.split(",") if size] for each in sizes)
    tokens, rounds = int(tokens), int(rounds)
    model = load(Path(folder))
    figures = {}

    def note(what, measure):
        figures[what] = speed(measure, rounds)
        print(f"mlx-lm {what:21}{figures[what]:12.1f}", file=sys.stderr, flush=True)

    for prompt in prompts:
        note(f"prefill {prompt}", lambda: prefill_speed(model, prompt))
    for depth in depths:
        note(f"decode at {depth}", lambda: decode(model, 1, max(depth, 8), tokens))
    for batch in batches:
        note(f"{batch} sequences", lambda: decode(model, batch, 8, tokens))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
