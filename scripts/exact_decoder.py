"""Llama, Qwen2 and Qwen3 in numpy float64, straight from the files, with nothing rounded: the answer that engines
approximate.

Quantized weights are decoded from their codes (`q * scale + bias` with the scales as stored); bits and group size
follow from the shapes, so the quantization settings in config.json are not used here. Affine quantization only.
"""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np


def read_tensors(paths):
    """Reads safetensors files into numpy: codes as they are, floats in float64."""
    tensors = {}
    for path in sorted(paths):
        for name, value in mx.load(str(path)).items():
            codes = value.dtype == mx.uint32
            tensors[name] = np.array(value) if codes else np.array(value.astype(mx.float32)).astype(np.float64)
    return tensors


def unpack_codes(words, bits):
    """Packed codes [rows, words] of uint32, low bits first -> codes [rows, words * 32 / bits]."""
    stream = np.unpackbits(words.astype("<u4").view(np.uint8), axis=-1, bitorder="little")
    return stream.reshape(words.shape[0], -1, bits) @ (1 << np.arange(bits))


def dequantize(words, scales, biases, in_dims):
    """Packed codes, scales and biases [rows, groups] -> weight [rows, in_dims]."""
    codes = unpack_codes(words, words.shape[-1] * 32 // in_dims)
    grouped = codes.reshape(words.shape[0], scales.shape[-1], -1)
    return (grouped * scales[..., None] + biases[..., None]).reshape(words.shape[0], in_dims)


def rms_norm(x, weight, eps):
    """Root mean square normalization over the last axis."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rope_frequencies(config, dim, tokens):
    """Radians a position of each pair of a head, and what the rotated head is multiplied by."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = config.get("rope_theta") or scaling.get("rope_theta")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    factor, context = scaling.get("factor"), scaling.get("original_max_position_embeddings")
    pairs = np.arange(dim // 2)
    if kind == "dynamic":
        most = config["max_position_embeddings"]
        theta *= (factor * max(tokens, most) / most - (factor - 1)) ** (dim / (dim - 2))
    frequencies = theta ** (-2.0 * pairs / dim)
    if kind == "linear":
        return frequencies / factor, 1.0
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = np.clip((context * frequencies / (2 * np.pi) - low) / (high - low), 0, 1)
        return frequencies * (kept + (1 - kept) / factor), 1.0
    if kind == "yarn":
        pair = lambda turns: dim * np.log(context / (turns * 2 * np.pi)) / (2 * np.log(theta))
        low = max(np.floor(pair(scaling.get("beta_fast", 32))), 0)
        high = min(np.ceil(pair(scaling.get("beta_slow", 1))), dim - 1)
        kept = 1 - np.clip((pairs - low) / (high - low), 0, 1)
        return frequencies * (kept + (1 - kept) / factor), 0.1 * np.log(factor) + 1
    return frequencies, 1.0


def rope(x, frequencies, amplitude):
    """Rotates x [heads, tokens, head_dim], the first half of each head against the second."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] * frequencies
    cos, sin = amplitude * np.cos(angles), amplitude * np.sin(angles)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def causal_attention(q, k, v):
    """q [heads, tokens, head_dim], k and v [kv_heads, tokens, head_dim] -> [heads, tokens, head_dim]."""
    groups = q.shape[0] // k.shape[0]
    k, v = np.repeat(k, groups, axis=0), np.repeat(v, groups, axis=0)
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
    scores = np.where(np.tri(q.shape[1], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ v


def log_softmax(logits):
    """The natural logarithm of softmax over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


class Adapter:
    """A LoRA or DoRA adapter in mlx-lm's format; without a folder, none."""

    def __init__(self, folder=None):
        self.tensors, self.scale = {}, 0.0
        if folder is not None:
            self.tensors = read_tensors([Path(folder) / "adapters.safetensors"])
            self.scale = json.loads((Path(folder) / "adapter_config.json").read_text())["lora_parameters"]["scale"]

    def pair(self, path):
        """A [in, rank], B [rank, out] of a module, or None."""
        a, b = (self.tensors.get(f"{path}.{name}") for name in ("lora_a", "lora_b"))
        return None if a is None else (a, b)

    def apply(self, path, x, weight, bias):
        """x [rows, in] through weight [out, in], the adapter of that module, and bias [out] or 0."""
        y = x @ weight.T
        if (pair := self.pair(path)) is None:
            return y + bias
        a, b = pair
        y = y + self.scale * (x @ a @ b)
        if (m := self.tensors.get(f"{path}.m")) is not None:
            y = y * (m / np.linalg.norm(weight + self.scale * (a @ b).T, axis=1))
        return y + bias


class ExactDecoder:
    """A checkpoint, with or without an adapter."""

    def __init__(self, folder, adapter=None):
        self.config = json.loads((Path(folder) / "config.json").read_text())
        self.tensors = read_tensors(Path(folder).glob("model*.safetensors"))
        self.adapter = Adapter(adapter)
        self.decoded = {}

    def weight(self, path, in_dims):
        """The weight of a linear layer or an embedding, decoded once."""
        if path not in self.decoded:
            weight, scales = self.tensors[f"{path}.weight"], self.tensors.get(f"{path}.scales")
            if scales is not None:
                weight = dequantize(weight, scales, self.tensors[f"{path}.biases"], in_dims)
            self.decoded[path] = weight
        return self.decoded[path]

    def linear(self, path, x):
        bias = self.tensors.get(f"{path}.bias", 0.0)
        return self.adapter.apply(path, x, self.weight(path, x.shape[-1]), bias)

    def norm(self, path, x):
        return rms_norm(x, self.tensors[f"{path}.weight"], self.config["rms_norm_eps"])

    def embed(self, ids):
        path = "model.embed_tokens"
        x = self.weight(path, self.config["hidden_size"])[ids]
        if (pair := self.adapter.pair(path)) is not None:
            x = x + self.adapter.scale * (pair[0][ids] @ pair[1])
        return x

    def head(self, x):
        """Logits; a tied head is the embedding transposed, its adapter too."""
        path = "model.embed_tokens"
        if not self.config["tie_word_embeddings"]:
            return self.linear("lm_head", x)
        logits = x @ self.weight(path, x.shape[-1]).T
        if (pair := self.adapter.pair(path)) is not None:
            logits = logits + self.adapter.scale * (x @ pair[1].T @ pair[0].T)
        return logits

    def head_dim(self):
        return self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"]

    def heads(self, path, x):
        """A projection of x, split into heads, which are normed where there is a norm: [heads, tokens, head_dim]."""
        heads = self.linear(f"{path}_proj", x).reshape(x.shape[0], -1, self.head_dim()).transpose(1, 0, 2)
        return self.norm(f"{path}_norm", heads) if f"{path}_norm.weight" in self.tensors else heads

    def attention(self, path, x):
        rotation = rope_frequencies(self.config, self.head_dim(), x.shape[0])
        q = rope(self.heads(f"{path}.q", x), *rotation)
        k = rope(self.heads(f"{path}.k", x), *rotation)
        mixed = causal_attention(q, k, self.heads(f"{path}.v", x))
        return self.linear(f"{path}.o_proj", mixed.transpose(1, 0, 2).reshape(x.shape[0], -1))

    def mlp(self, path, x):
        gate = self.linear(f"{path}.gate_proj", x)
        return self.linear(f"{path}.down_proj", gate / (1 + np.exp(-gate)) * self.linear(f"{path}.up_proj", x))

    def logits(self, ids):
        """Logits [tokens, vocab] of one sequence."""
        x = self.embed(np.array(ids))
        for index in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{index}"
            x = x + self.attention(f"{layer}.self_attn", self.norm(f"{layer}.input_layernorm", x))
            x = x + self.mlp(f"{layer}.mlp", self.norm(f"{layer}.post_attention_layernorm", x))
        return self.head(self.norm("model.norm", x))

    def logprobs(self, ids):
        """ln p(token i | the tokens before it), for every token but the first."""
        return log_softmax(self.logits(ids[:-1]))[np.arange(len(ids) - 1), ids[1:]]

    def greedy(self, prompt, count):
        """The greedy continuation, and how far each token's logit is ahead of the second best."""
        ids, margins = list(prompt), []
        for _ in range(count):
            last = self.logits(ids)[-1]
            second, best = np.sort(last)[-2:]
            margins.append(float(best - second))
            ids.append(int(last.argmax()))
        return ids[len(prompt) :], margins
