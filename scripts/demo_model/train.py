"""trains the demo model: a small Qwen3 on the corpus, in its last part with the weights quantized as they will be shipped

    python3 train.py TOKENIZER_FOLDER OUT_FOLDER [--steps 7500] [--minutes 5] [--documents 1000000]

Runs on a GPU where torch sees one, else on the CPU (slowly). Needs torch, transformers and tokenizers.
"""

import argparse
import math
import random
import shutil
import time
from multiprocessing import Pool
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch.func import functional_call
from transformers import Qwen3Config, Qwen3ForCausalLM

from corpus import document
from quantize import fake_quantized
from sample import report

ROW = 256  # tokens; documents stand one after another in a row, and a row begins with a document
BATCH = 256  # rows
PEAK_RATE, WARMUP = 2e-3, 200
QUANTIZED_FROM = 0.4  # the part of training after which the weights are quantized


def options():
    parser = argparse.ArgumentParser()
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=7500)
    parser.add_argument("--minutes", type=float, default=60, help="fewer steps where they would take longer than this")
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--per-topic", type=int, default=400, help="samples of each topic in the report at the end")
    return parser.parse_args()


def config(vocab_size):
    return Qwen3Config(
        vocab_size=vocab_size, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, rope_theta=10000.0, max_position_embeddings=2048, rms_norm_eps=1e-6,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=[2, 0], pad_token_id=0,
    )


def documents(count, seed):
    rng = random.Random(seed)
    return [document(rng) for _ in range(count)]


def encoded(tokenizer, docs):
    """a list of (ids, whether each is learned), one a document"""
    texts = [text for doc in docs for text, _ in doc]
    parts = iter(tokenizer.encode_batch(texts, add_special_tokens=False))
    out = []
    for doc in docs:
        ids, learned = [], []
        for (_, learn), part in zip(doc, parts):
            ids += part.ids
            learned += [learn] * len(part.ids)
        out.append((ids, learned))
    return out


def packed(docs):
    """rows of ROW + 1 ids, and the same with -100 where nothing is learned"""
    rows, targets, ids, labels = [], [], [], []
    for doc, learned in docs:
        ids += doc
        labels += [i if learn else -100 for i, learn in zip(doc, learned)]
        if len(ids) > ROW:
            rows.append(ids[: ROW + 1])
            targets.append(labels[: ROW + 1])
            ids, labels = [], []
    return torch.tensor(rows, dtype=torch.int16), torch.tensor(targets, dtype=torch.int16)


def part(args):
    path, count, seed = args
    return packed(encoded(Tokenizer.from_file(path), documents(count, seed)))


def dataset(tokenizer_file, count, parts=64):
    with Pool() as pool:
        jobs = [(str(tokenizer_file), count // parts, seed) for seed in range(parts)]
        rows, targets = zip(*pool.map(part, jobs))
    return torch.cat(rows), torch.cat(targets)


def learning_rate(progress, step):
    return PEAK_RATE * min(1, (step + 1) / WARMUP) * max(0.002, 0.5 * (1 + math.cos(math.pi * progress)))


def loss_of(model, weights, rows, targets):
    logits = functional_call(model, weights, kwargs={"input_ids": rows[:, :-1], "use_cache": False}).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets[:, 1:].flatten(), ignore_index=-100)


def train(model, rows, targets, args, device):
    weights = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(weights.values(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.05, fused=device == "cuda")
    steps, start, total = args.steps, time.time(), 0.0
    step = 0
    while step < steps:
        picked = torch.randint(len(rows), (args.batch,), device=device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step / steps, step)
        seen = fake_quantized(weights) if step >= QUANTIZED_FROM * steps else weights
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = loss_of(model, seen, rows[picked].long(), targets[picked].long())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0, foreach=True)
        optimizer.step()
        step += 1
        if step == 100 or step % 500 == 0:
            pace = (time.time() - start) / step
            steps = min(steps, step + int((args.minutes * 60 - pace * step) / pace))
            print(f"step {step}/{steps} loss {loss.item():.4f} {pace * 1000:.1f} ms a step", flush=True)
    print(f"{steps} steps in {time.time() - start:.0f} s, last loss {loss.item():.4f}", flush=True)


def save(model, tokenizer_folder, out):
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_folder / name, out / name)


def main():
    args = options()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    start = time.time()
    rows, targets = dataset(args.tokenizer / "tokenizer.json", args.documents)
    print(f"{len(rows)} rows of {ROW} tokens in {time.time() - start:.0f} s", flush=True)
    tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    model = Qwen3ForCausalLM(config(tokenizer.get_vocab_size())).to(device)
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    train(model, rows.to(device), targets.to(device), args, device)
    save(model, args.tokenizer, args.out)
    with torch.no_grad():
        for name, w in fake_quantized(dict(model.named_parameters())).items():
            model.get_parameter(name).copy_(w)
    report(model.to(torch.bfloat16 if device == "cuda" else torch.float32), tokenizer, device, args.per_topic)


if __name__ == "__main__":
    main()
