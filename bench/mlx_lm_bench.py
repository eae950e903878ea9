"""mlx-lm's speed on a checkpoint, for the benchmark: python mlx_lm_bench.py CHECKPOINT PROMPT_TOKENS

Prints {"prefill": tokens/s, "decode": tokens/s}; on the device that MLX takes by itself.
"""

import json
import sys
import time
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

TOKENS = 8


def main():
    model, _ = load_model(Path(sys.argv[1]))
    prompt = mx.array([[(place * 7919 + 11) % 2000 for place in range(int(sys.argv[2]))]])
    cache = make_prompt_cache(model)
    start = time.perf_counter()
    # The last token's logits alone, as in generation.
    model(prompt[:, :-1], cache=cache)
    token = model(prompt[:, -1:], cache=cache)[:, -1].argmax(-1)
    mx.eval(token, [layer.state for layer in cache])
    prefilled = time.perf_counter()
    for _ in range(TOKENS):
        token = model(token[None], cache=cache)[:, -1].argmax(-1)
        mx.eval(token)
    end = time.perf_counter()
    print(json.dumps({"prefill": prompt.size / (prefilled - start), "decode": TOKENS / (end - prefilled)}))


if __name__ == "__main__":
    main()
