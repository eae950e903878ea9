"""The dense families in numpy float64, straight from the files, with nothing rounded: the answer that engines
approximate.

Quantized weights are decoded from their codes (`q * scale + bias` with the scales as stored); bits and group size
follow from the shapes, so the quantization settings in config.json are not used here. Affine quantization only.
"""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np

from exact_families import form


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


def normalize(x, weight, eps, centered=False):
    """Root mean square normalization over the last axis; centered, LayerNorm."""
    if centered:
        x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rope_frequencies(config, theta, scaling, dim, tokens):
    """Radians a position of each pair of a head, and what the rotated numbers are multiplied by."""
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    factor, context = scaling.get("factor"), scaling.get("original_max_position_embeddings")
    pairs = np.arange(dim // 2)
    if kind == "dynamic" and "alpha" in scaling:
        theta *= scaling["alpha"] ** (dim / (dim - 2))
    elif kind == "dynamic":
        most = config["max_position_embeddings"]
        theta *= (factor * max(tokens, most) / most - (factor - 1)) ** (dim / (dim - 2))
    frequencies = theta ** (-2.0 * pairs / dim)
    if kind == "linear":
        return frequencies / factor, 1.0
    if kind in ("longrope", "su"):
        most, context = config["max_position_embeddings"], config["original_max_position_embeddings"]
        amplitude = np.sqrt(1 + np.log(most / context) / np.log(context)) if most > context else 1.0
        return frequencies / np.array(scaling["long_factor"]), amplitude
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = np.clip((context * frequencies / (2 * np.pi) - low) / (high - low), 0, 1)
        return frequencies * (kept + (1 - kept) / factor), 1.0
    if kind == "yarn":
        pair = lambda turns: dim * np.log(context / (turns * 2 * np.pi)) / (2 * np.log(theta))
        low = max(np.floor(pair(scaling.get("beta_fast", 32))), 0)
        high = min(np.ceil(pair(scaling.get("beta_slow", 1))), dim - 1)
        kept = 1 - np.clip((pairs - low) / (high - low), 0, 1)
        of = lambda mscale: 0.1 * mscale * np.log(factor) + 1 if factor > 1 else 1.0
        return frequencies * (kept + (1 - kept) / factor), of(scaling.get("mscale", 1)) / of(scaling.get("mscale_all_dim", 0))
    return frequencies, 1.0


def rope(x, frequencies, amplitude, interleaved=False):
    """Rotates the first numbers of x [heads, tokens, head_dim]: halves against each other, or neighbours."""
    half = len(frequencies)
    angles = np.arange(x.shape[1])[:, None] * frequencies
    cos, sin = amplitude * np.cos(angles), amplitude * np.sin(angles)
    places = np.arange(2 * half).reshape((half, 2) if interleaved else (2, half))
    low, high = places.T if interleaved else places
    rotated, (first, second) = x.copy(), (x[..., low], x[..., high])
    rotated[..., low] = first * cos - second * sin
    rotated[..., high] = second * cos + first * sin
    return rotated


def causal_attention(q, k, v, scale, window=None, cap=None):
    """q [heads, tokens, head_dim], k and v [kv_heads, tokens, head_dim] -> [heads, tokens, head_dim]."""
    groups, tokens = q.shape[0] // k.shape[0], q.shape[1]
    k, v = np.repeat(k, groups, axis=0), np.repeat(v, groups, axis=0)
    scores = q @ k.transpose(0, 2, 1) * scale
    if cap is not None:
        scores = cap * np.tanh(scores / cap)
    behind = np.arange(tokens)[:, None] - np.arange(tokens)
    seen = (behind >= 0) & (behind < (window or tokens))
    scores = np.where(seen, scores, -np.inf)
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
        self.form = form(self.config)

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

    def norm(self, path, x, heads=False):
        """A norm by its path; without one, x."""
        if path is None or f"{path}.weight" not in self.tensors:
            return x
        weight = self.tensors[f"{path}.weight"] + self.form.norm_offset
        return normalize(x, weight, self.form.eps, self.form.centered and not heads)

    def embed(self, ids):
        path = "model.embed_tokens"
        x = self.weight(path, self.config["hidden_size"])[ids]
        if (pair := self.adapter.pair(path)) is not None:
            x = x + self.adapter.scale * (pair[0][ids] @ pair[1])
        return x * self.form.embedding_scale

    def head(self, x):
        """Logits; a tied head is the embedding transposed, its adapter too."""
        logits = self.linear("lm_head", x) if not self.form.tied else self.tied_head(x)
        logits = logits * self.form.logit_scale
        cap = self.form.logit_cap
        return logits if cap is None else cap * np.tanh(logits / cap)

    def tied_head(self, x):
        path = "model.embed_tokens"
        logits = x @ self.weight(path, x.shape[-1]).T
        if (pair := self.adapter.pair(path)) is not None:
            logits = logits + self.adapter.scale * (x @ pair[1].T @ pair[0].T)
        return logits

    def qkv(self, path, x):
        """q, k and v, [tokens, heads * head_dim] each."""
        if not self.form.fused or f"{path}.qkv_proj.weight" not in self.tensors:
            return [self.linear(f"{path}.{name}_proj", x) for name in "qkv"]
        q, kv = (heads * self.form.head_dim for heads in (self.form.heads, self.form.kv_heads))
        return np.split(self.linear(f"{path}.qkv_proj", x), [q, q + kv], axis=-1)

    def heads(self, path, norm, x, layer):
        """Heads of q or k, normed and rotated as the family does it: [heads, tokens, head_dim]."""
        form, norm = self.form, f"{path}.{norm}"
        if form.norm_all_heads:
            x = self.norm(norm, x, heads=True)
        x = x.reshape(x.shape[0], -1, form.head_dim).transpose(1, 0, 2)
        if not form.norm_all_heads and not form.norm_rotated:
            x = self.norm(norm, x, heads=True)
        if form.rotated[layer]:
            theta, scaling = form.rope_settings(layer)
            rotation = rope_frequencies(self.config, theta, scaling, form.rotated_dim, x.shape[1])
            x = rope(x, *rotation, form.interleaved)
        return self.norm(norm, x, heads=True) if form.norm_rotated else x

    def attention(self, layer, path, x):
        form, (q, k, v) = self.form, self.qkv(path, x)
        q, k = (self.heads(path, norm, part, layer) for norm, part in zip(form.qk_norms, (q, k)))
        v = v.reshape(x.shape[0], -1, form.head_dim).transpose(1, 0, 2)
        if form.query_growth:
            beta, context = form.query_growth
            q = q * (1 + beta * np.log(1 + np.arange(x.shape[0]) // context))[:, None]
        mixed = causal_attention(q, k, v, form.scale, form.windows[layer], form.score_cap)
        return self.linear(f"{path}.o_proj", mixed.transpose(1, 0, 2).reshape(x.shape[0], -1))

    def mlp(self, path, x):
        if self.form.fused:
            gate, up = np.split(self.linear(f"{path}.gate_up_proj", x), 2, axis=-1)
        else:
            gate, up = self.linear(f"{path}.gate_proj", x), self.linear(f"{path}.up_proj", x)
        if self.form.gelu:
            gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        else:
            gate = gate / (1 + np.exp(-gate))
        return self.linear(f"{path}.down_proj", gate * up)

    def logits(self, ids):
        """Logits [tokens, vocab] of one sequence."""
        x, form = self.embed(np.array(ids)), self.form
        for index in range(form.layers):
            layer = f"model.layers.{index}"
            before, after, before_mlp, after_mlp = (name and f"{layer}.{name}" for name in form.norms)
            normed = self.norm(before, x)
            attended = self.norm(after, self.attention(index, f"{layer}.self_attn", normed))
            x = x + form.residual_scale * attended
            normed = normed if form.parallel else self.norm(before_mlp, x)
            x = x + form.residual_scale * self.norm(after_mlp, self.mlp(f"{layer}.mlp", normed))
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
