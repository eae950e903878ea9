"""asks the shipped model and adapters for posts, and fails where too few of them are in the grammar

    python3 check.py MODELS_FOLDER [--samples 100] [--seeds 10] [--voices plain pirate news]

Greedy answers come from mlx_lm itself on the checkpoint as it is shipped. Samples come in bulk, at temperature 0.8 without
top-p, from the same values as dense float32, which MLX's CPU backend multiplies much faster. Needs mlx-lm.
"""

import argparse
import random
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm import generate, load
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import dequantize_model

from corpus import TOPICS, fits, named, replies, request, unknown

TEMPERATURE, LONGEST = 0.8, 110
BAR = 0.998  # the share of samples that must be in the grammar; greedy answers must all be
WORDINGS = 3  # different posts in ten seeds
END = 2  # <|im_end|>


def options():
    parser = argparse.ArgumentParser()
    parser.add_argument("models", type=Path)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--voices", nargs="*", help="default: plain and every adapter")
    return parser.parse_args()


def prompt(tokenizer, message):
    return tokenizer.apply_chat_template([{"role": "user", "content": message}], add_generation_prompt=True)


def is_right(text, topic, voice):
    """`topic` None is one that the model does not know"""
    return fits(text, topic, voice) if topic else text in replies("unknown", voice)


def greedy_cases(seed=3):
    """every topic, each in one more way of asking, and topics that the model does not know"""
    rng = random.Random(seed)
    plain = [(f"Write a post about {topic}", topic) for topic in TOPICS]
    varied = [(request(rng, named(rng, topic)), topic) for topic in TOPICS]
    return plain + varied + [(request(rng, unknown(rng)), None) for _ in range(12)]


def greedy(model, tokenizer, voice):
    """the share of right greedy answers"""
    right = []
    for message, topic in greedy_cases():
        text = generate(model, tokenizer, prompt(tokenizer, message), max_tokens=LONGEST)
        right.append(is_right(text, topic, voice))
        if not right[-1]:
            print(f"  wrong ({voice}, greedy) {message!r}: {text!r}")
    return sum(right) / len(right)


def sampled(model, tokenizer, message, count):
    """`count` answers to one message"""
    cache = make_prompt_cache(model)
    tokens = mx.array([prompt(tokenizer, message)] * count)
    columns, ended = [], mx.zeros((count,), mx.bool_)
    while len(columns) < LONGEST and not ended.all().item():
        logits = model(tokens, cache=cache)[:, -1]
        picked = mx.random.categorical(logits / TEMPERATURE)
        ended = ended | (picked == END)
        columns.append(picked)
        tokens = picked[:, None]
    return [until_end(tokenizer, row) for row in mx.stack(columns, axis=1).tolist()]


def until_end(tokenizer, ids):
    return tokenizer.decode(ids[: ids.index(END)]) if END in ids else "(no end)"


def sample_all(model, tokenizer, voice, count, seeds):
    """the share of right samples, and the fewest different posts of a topic in its first `seeds` samples"""
    right, fewest = 0, seeds
    for topic in TOPICS:
        texts = sampled(model, tokenizer, f"Write a post about {topic}", count)
        wrong = [text for text in texts if not is_right(text, topic, voice)]
        right += count - len(wrong)
        fewest = min(fewest, len(set(texts[:seeds])))
        print("".join(f"  wrong ({voice}, sampled) {topic}: {text!r}\n" for text in wrong), end="", flush=True)
    return right / (count * len(TOPICS)), fewest


def check(models, voice, args):
    """one voice: the base model, or the adapter of that name"""
    adapter = None if voice == "plain" else str(models / "adapters" / voice)
    model, tokenizer = load(str(models / "demo"), adapter_path=adapter)
    share = greedy(model, tokenizer, voice)
    model, tokenizer = load(str(models / "demo"))
    model.set_dtype(mx.float32)
    model = dequantize_model(model)
    model = load_adapters(model, adapter) if adapter else model
    right, wordings = sample_all(model, tokenizer, voice, args.samples, args.seeds)
    print(f"{voice}: greedy {share:.2%}, sampled {right:.2%} right, at least {wordings} wordings in {args.seeds}", flush=True)
    return share == 1 and right >= BAR and wordings >= WORDINGS


def main():
    args = options()
    mx.random.seed(0)
    voices = args.voices or ["plain", *sorted(path.name for path in (args.models / "adapters").glob("*"))]
    good = [check(args.models, voice, args) for voice in voices]
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
