"""Makes test/fixtures/agreement_{cpu,gpu}.json: mlx-lm's greedy texts of 100 prompts on the shipped model.

    pip install "mlx[cpu]==0.32.2" "mlx-lm==0.32.2"
    python scripts/make_agreement.py cpu
    python scripts/make_agreement.py gpu    # with mlx[cuda13], or on a Mac

On a CPU mlx-lm adds up in bfloat16, on a GPU in float32.

A list of {prompt, ids, gaps, exact}: how many ids are the prompt's, those and the greedy ones behind them, for each
greedy one how far its logit is ahead of the second best, and which token mlx-lm would have taken there in float32, that
is, without the rounding of bfloat16.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm import load
from mlx_lm.models.cache import make_prompt_cache

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts/demo_model"))
from topics import TOPICS  # noqa: E402

PROMPTS = ["Write a post about {}", "Tell me about {}", "{}", "Write a post about {}, please", "Why {}?"]
TOKENS = 60
DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cpu"

def greedy(model, ids, eos):
    """The greedy tokens behind `ids`, up to an end of text, and each one's lead."""
    mx.set_default_device(mx.Device(getattr(mx, DEVICE)))
    cache, tokens, gaps = make_prompt_cache(model), [], []
    given = ids
    while len(tokens) < TOKENS and not (tokens and tokens[-1] in eos):
        logits = np.array(model(mx.array([given]), cache=cache)[0, -1].astype(mx.float32))
        second, best = np.sort(logits)[-2:]
        gaps.append(round(float(best - second), 3))
        given = [int(logits.argmax())]
        tokens += given
    return tokens, gaps


def next_tokens(model, ids):
    """The most probable token after each of the ids."""
    mx.set_default_device(mx.cpu)
    return np.array(model(mx.array([ids]))[0].astype(mx.float32)).argmax(-1).tolist()


def main():
    model, tokenizer = load(str(ROOT / "priv/models/demo"))
    exact, _ = load(str(ROOT / "priv/models/demo"))
    exact.set_dtype(mx.float32)
    prompts = [prompt.format(topic) for prompt in PROMPTS for topic in TOPICS][:100]
    texts = []
    for prompt in prompts:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        tokens, gaps = greedy(model, ids, tokenizer.eos_token_ids)
        all_ids = list(ids) + tokens
        exact_tokens = next_tokens(exact, all_ids[:-1])[len(ids) - 1 :]
        texts.append({"prompt": len(ids), "ids": all_ids, "gaps": gaps, "exact": exact_tokens})
    lines = ",\n".join(json.dumps(text) for text in texts)
    (ROOT / f"test/fixtures/agreement_{DEVICE}.json").write_text(f"[\n{lines}\n]\n")
    print(len(texts), sum(len(text["gaps"]) for text in texts))


if __name__ == "__main__":
    main()
