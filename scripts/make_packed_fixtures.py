"""Makes the fixtures of AWQ and GPTQ: small random Qwen3 checkpoints, with what mlx-lm makes of their tensors.

    pip install "mlx[cpu]==0.32.2" "mlx-lm==0.32.2" numpy
    python scripts/make_packed_fixtures.py [OUT_DIR]      # default: test/fixtures/packed

Each case is a folder: config.json, model.safetensors, and expected.json: for every tensor of the model that mlx-lm
loads from there its type, its shape and the SHA-256 of its bytes. mlx-lm reads no GPTQ in GPTQ's own order: there it
is the same numbers in AWQ's.

The seed of a case is its name.
"""

import hashlib
import json
import sys
import tempfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

mx.set_default_device(mx.cpu)

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS = 128, 64, 2, 1, 32, 64, 1

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "eos_token_id": 1,
    "head_dim": HEAD_DIM,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "max_position_embeddings": 512,
    "model_type": "qwen3",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "vocab_size": VOCAB,
}

# Outputs and inputs.
LINEAR = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


@dataclass
class Case:
    """A checkpoint: `order` is that of its words, whatever `method` says; no `zeros` is symmetric."""

    name: str
    method: str
    order: str
    group_size: int = 64
    dtype: mx.Dtype = mx.float16
    zeros: bool = True
    tied: bool = False
    packed_head: bool = False
    quantization: dict = field(default_factory=dict)

    def config(self):
        """config.json."""
        own = {"quant_method": self.method, "bits": 4, "group_size": self.group_size, **self.quantization}
        return {**CONFIG, "tie_word_embeddings": self.tied, "quantization_config": own}


CASES = [
    Case("awq", "awq", "awq", quantization={"version": "gemm", "zero_point": True}),
    Case("awq-symmetric", "awq", "awq", group_size=32, zeros=False, tied=True, dtype=mx.bfloat16),
    Case("gptq-as-awq", "gptq", "awq", packed_head=True, quantization={"desc_act": False, "sym": True}),
    Case("gptq", "gptq", "gptq", quantization={"checkpoint_format": "gptq", "desc_act": False, "sym": False}),
    Case("gptq-v2", "gptq", "gptq_v2", group_size=32, quantization={"checkpoint_format": "gptq_v2"}),
]


def words(nibbles):
    """[..., 8] numbers of 4 bits -> [...] of 32, the first in the low bits."""
    shifts = np.arange(8, dtype=np.uint32) * 4
    return np.bitwise_or.reduce(nibbles.astype(np.uint32) << shifts, axis=-1).view(np.int32)


def pack_outputs(codes, order):
    """[rows, out] -> [rows, out / 8]; AWQ has each eight in the order of AutoAWQ's `order_map`."""
    eights = codes.reshape(codes.shape[0], -1, 8)
    return words(eights[..., [0, 2, 4, 6, 1, 3, 5, 7]] if order == "awq" else eights)


def pack_inputs(codes):
    """[in, out] -> [in / 8, out]"""
    return words(np.moveaxis(codes.reshape(-1, 8, codes.shape[1]), 1, -1))


def matrix(case, order, rng, outputs, inputs):
    """The tensors of one matrix."""
    groups = inputs // case.group_size
    codes = rng.integers(0, 16, (inputs, outputs))
    # 0 as GPTQ writes it would reach into the next one.
    zeros = rng.integers(1, 16, (groups, outputs))
    scales = mx.array(rng.uniform(0.001, 0.02, (groups, outputs)), dtype=case.dtype)
    tensors = {"scales": scales}
    tensors["qweight"] = pack_outputs(codes, order) if order == "awq" else pack_inputs(codes)
    if case.zeros:
        tensors["qzeros"] = pack_outputs(zeros - (order == "gptq"), order)
    if order != "awq":
        tensors["g_idx"] = (np.arange(inputs) // case.group_size).astype(np.int32)
    return tensors


def checkpoint(case, order):
    """All tensors of a case, the same numbers in every order."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    dense = lambda *shape: mx.array(rng.normal(0, 0.05, shape), dtype=mx.bfloat16)
    tensors = {"model.embed_tokens.weight": dense(VOCAB, HIDDEN), "model.norm.weight": 1 + dense(HIDDEN)}
    linear = {}
    for layer in range(LAYERS):
        path = f"model.layers.{layer}"
        for norm in ["input_layernorm", "post_attention_layernorm"]:
            tensors[f"{path}.{norm}.weight"] = 1 + dense(HIDDEN)
        for norm in ["q_norm", "k_norm"]:
            tensors[f"{path}.self_attn.{norm}.weight"] = 1 + dense(HEAD_DIM)
        linear |= {f"{path}.{name}": shape for name, shape in LINEAR.items()}
    if case.packed_head:
        linear["lm_head"] = (VOCAB, HIDDEN)
    elif not case.tied:
        tensors["lm_head.weight"] = dense(VOCAB, HIDDEN)
    for path, (outputs, inputs) in linear.items():
        parts = matrix(case, order, rng, outputs, inputs)
        tensors |= {f"{path}.{name}": mx.array(part) for name, part in parts.items()}
    return tensors


def write(folder, case, order):
    """A checkpoint in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(case.config(), indent=2) + "\n")
    mx.save_safetensors(str(folder / "model.safetensors"), checkpoint(case, order), {"format": "pt"})


def described(array):
    """Type, shape and the bytes' hash."""
    name = {mx.uint32: "U32", mx.float16: "F16", mx.bfloat16: "BF16", mx.float32: "F32"}[array.dtype]
    raw = np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array).tobytes()
    return {"dtype": name, "shape": list(array.shape), "sha256": hashlib.sha256(raw).hexdigest()}


def main():
    """Writes all cases."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "test/fixtures/packed")
    for case in CASES:
        write(out / case.name, case, case.order)
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), case, "awq")
            model, _ = load_model(Path(folder))
        expected = {name: described(array) for name, array in tree_flatten(model.parameters())}
        text = json.dumps(expected, indent=1, sort_keys=True) + "\n"
        (out / case.name / "expected.json").write_text(text)
        print(case.name)


if __name__ == "__main__":
    main()
