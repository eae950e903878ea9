"""Writes a Llama of a GGUF file as an MLX checkpoint with its tokenizer, without loss.

    python scripts/gguf_to_mlx.py MODEL.gguf FOLDER      # needs numpy, mlx and tokenizers

Q4_1 and Q8_0 are MLX's affine quantization in groups of 32: the codes stay, and float32 holds each scale and bias
exactly. Other types of GGUF are refused by name. What llama.cpp has changed in a Llama is undone: the names of
tensors, and the order of the rows of q and k.
"""

import json
import mmap
import struct
import sys
from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

GROUP = 32
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
CONTROL, USER_DEFINED = 3, 4

PATHS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# How a text is cut before the merges, by `tokenizer.ggml.pre`.
PRE_TOKENIZERS = {
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
}


class Reader:
    """GGUF's values, one after another, in a mapped file."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def bytes(self, size):
        self.at += size
        return self.data[self.at - size : self.at]

    def scalar(self, code):
        return struct.unpack(f"<{code}", self.bytes(struct.calcsize(f"<{code}")))[0]

    def string(self):
        return self.bytes(self.scalar("Q")).decode()

    def value(self, kind):
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, count = self.scalar("I"), self.scalar("Q")
            return [self.value(kind) for _ in range(count)]
        return self.scalar(SCALARS[kind])


def read_gguf(path):
    """-> the metadata, and the tensors as (name, shape, type, data from its first byte on)"""
    with open(path, "rb") as file:
        reader = Reader(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    magic, version = reader.bytes(4), reader.scalar("I")
    if magic != b"GGUF" or version not in (2, 3):
        sys.exit(f"{path}: not GGUF in version 2 or 3")
    tensor_count, value_count = reader.scalar("Q"), reader.scalar("Q")
    metadata = {reader.string(): reader.value(reader.scalar("I")) for _ in range(value_count)}
    entries = []
    for _ in range(tensor_count):
        name, dims = reader.string(), reader.scalar("I")
        # The fastest dimension is first.
        shape = [reader.scalar("Q") for _ in range(dims)][::-1]
        entries.append((name, shape, reader.scalar("I"), reader.scalar("Q")))
    alignment = metadata.get("general.alignment", 32)
    start = -(-reader.at // alignment) * alignment
    data = memoryview(reader.data)
    return metadata, [(name, shape, kind, data[start + offset :]) for name, shape, kind, offset in entries]


def float32(shape, data):
    return {"weight": np.frombuffer(data, "<f4", prod(shape)).reshape(shape)}


def q4_1(shape, data):
    """Blocks of scale, minimum and 32 codes: the first half in the low bits of 16 bytes, the second in the high."""
    layout = np.dtype([("scale", "<f2"), ("least", "<f2"), ("codes", "u1", GROUP // 2)])
    blocks = np.frombuffer(data, layout, prod(shape) // GROUP).reshape(shape[0], -1)
    codes = np.concatenate([blocks["codes"] & 15, blocks["codes"] >> 4], axis=-1)
    # MLX has neighbours in a byte, the first in its low bits.
    return affine(codes[..., 0::2] | codes[..., 1::2] << 4, blocks["scale"], blocks["least"])


def q8_0(shape, data):
    """Blocks of scale and 32 codes from -128 on; MLX's begin at 0."""
    layout = np.dtype([("scale", "<f2"), ("codes", "i1", GROUP)])
    blocks = np.frombuffer(data, layout, prod(shape) // GROUP).reshape(shape[0], -1)
    scales = blocks["scale"].astype(np.float32)
    return affine(blocks["codes"].view(np.uint8) ^ 128, scales, -128 * scales)


def affine(code_bytes, scales, biases):
    """Codes as bytes [rows, groups, bytes of a group] -> a quantized layer's tensors"""
    words = np.ascontiguousarray(code_bytes).reshape(code_bytes.shape[0], -1).view("<u4")
    return {"weight": words, "scales": scales.astype(np.float32), "biases": biases.astype(np.float32)}


TYPES = {0: float32, 3: q4_1, 8: q8_0}
BITS = {3: 4, 8: 8}


def rotated_by_halves(rows, heads):
    """llama.cpp rotates neighbours of a head, transformers the first half against the second."""
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def module_path(name):
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj`"""
    parts = name.split(".")
    if parts[-1] != "weight" or parts[-2] not in PATHS:
        sys.exit(f"the tensor {name} has no place in a Llama")
    return f"model.layers.{parts[1]}.{PATHS[parts[-2]]}" if parts[0] == "blk" else PATHS[parts[-2]]


def convert_tensors(tensors, config):
    """-> the checkpoint's tensors by name, and the bits of each quantized module"""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    converted, bits = {}, {}
    for name, shape, kind, data in tensors:
        if kind not in TYPES:
            sys.exit(f"the tensor {name} is of GGUF's type {kind}: only F32, Q4_1 and Q8_0 can be converted")
        path = module_path(name)
        if kind in BITS:
            bits[path] = BITS[kind]
        for part, value in TYPES[kind](shape, data).items():
            if (count := heads.get(path.split(".")[-1])) is not None:
                value = rotated_by_halves(value, count)
            converted[f"{path}.{part}"] = mx.array(value)
    return converted, bits


def shortest(value):
    """The shortest decimal number that is this one in float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def llama_config(metadata):
    """config.json, but for the quantization."""
    if (architecture := metadata["general.architecture"]) != "llama":
        sys.exit(f"only a Llama can be converted: this is a {architecture}")
    get = lambda name: metadata[f"llama.{name}"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "head_dim": get("rope.dimension_count"),
        "hidden_act": "silu",
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "max_position_embeddings": get("context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": get("attention.head_count"),
        "num_hidden_layers": get("block_count"),
        "num_key_value_heads": get("attention.head_count_kv"),
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "rms_norm_eps": shortest(get("attention.layer_norm_rms_epsilon")),
        "rope_theta": shortest(get("rope.freq_base")),
        "torch_dtype": "float32",
        "vocab_size": get("vocab_size"),
    }


def quantization(bits):
    """The bits that most modules have, and the modules that have others."""
    common = max(set(bits.values()), key=list(bits.values()).count)
    others = {path: {"group_size": GROUP, "bits": own} for path, own in bits.items() if own != common}
    return {"group_size": GROUP, "bits": common, **others}


def tokenizer(metadata):
    """The byte-level BPE of the metadata, as `tokenizers` has it."""
    get = lambda name: metadata[f"tokenizer.ggml.{name}"]
    if (kind := (get("model"), get("pre"))) not in [("gpt2", pre) for pre in PRE_TOKENIZERS]:
        sys.exit(f"a tokenizer of the kind {'/'.join(kind)} cannot be converted")
    vocab = {token: id for id, token in enumerate(get("tokens"))}
    built = Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in get("merges")]))
    built.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[get("pre")])
    built.decoder = decoders.ByteLevel()
    for token, kind in zip(get("tokens"), get("token_type")):
        if kind in (CONTROL, USER_DEFINED):
            built.add_tokens([AddedToken(token, normalized=False, special=kind == CONTROL)])
    return built


def tokenizer_config(metadata):
    get = lambda name: metadata[f"tokenizer.ggml.{name}"]
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    tokens = {f"{short}_token": get("tokens")[get(f"{name}_token_id")] for short, name in named.items()}
    return {
        "add_bos_token": get("add_bos_token"),
        "add_prefix_space": get("add_space_prefix"),
        **tokens,
        "chat_template": metadata["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        # Of transformers 5's classes this one takes tokenizer.json as it is.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def main(source, folder):
    metadata, tensors = read_gguf(source)
    config = llama_config(metadata)
    converted, bits = convert_tensors(tensors, config)
    config["tie_word_embeddings"] = "lm_head.weight" not in converted
    config["quantization"] = quantization(bits)
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), converted, {"format": "mlx"})
    tokenizer(metadata).save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config(metadata))
    write_json(folder / "generation_config.json", {name: config[name] for name in ("bos_token_id", "eos_token_id")})
    write_json(folder / "config.json", config)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
