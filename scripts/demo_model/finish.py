"""what mlx_lm.convert and mlx_lm.lora leave, reduced to what loading needs

    python3 finish.py model OUT CONVERTED TOKENIZER    the checkpoint with config files as other MLX checkpoints have them
    python3 finish.py adapter OUT TRAINED              adapters.safetensors and a short adapter_config.json

Needs mlx and mlx-lm.
"""

import json
import shutil
import sys
from pathlib import Path

import mlx.core as mx

CONFIG = [
    "architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "attention_bias", "max_position_embeddings",
    "rms_norm_eps", "rope_theta", "rope_scaling", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
    "quantization", "quantization_config",
]
# All logits are multiplied by this (through the last norm), as if the temperature were lower. What the grammar allows is
# about equally likely and stays so; what it does not allow gets several times rarer.
SHARPNESS = 1.25
# `lora_b` is multiplied by this. At half strength the voice is as clear, and what the adapters were not trained on (text
# without chat markup, unusual wishes) is disturbed less: see README.md.
STRENGTH = 0.5
ADAPTER_CONFIG = ["fine_tune_type", "num_layers", "lora_parameters", "iters", "learning_rate", "seed"]


def read(path):
    return json.loads(path.read_text())


def write(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")


def replaced(out, files):
    """moves a folder made by `files(folder)` to `out` in one go: others may be reading the old one"""
    new, old = out.with_name(out.name + ".new"), out.with_name(out.name + ".old")
    for folder in (new, old):
        shutil.rmtree(folder, ignore_errors=True)
    new.mkdir(parents=True)
    files(new)
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def plain_config(config):
    """the config with rope_theta at the top, where MLX checkpoints of Qwen3 have it"""
    rope = config.get("rope_parameters") or {}
    full = {"rope_theta": rope.get("rope_theta"), "rope_scaling": None, **config, "eos_token_id": 2, "bos_token_id": None}
    return {key: full[key] for key in CONFIG} | {"torch_dtype": "bfloat16"}


def model(folder, converted, tokenizer):
    write(folder / "config.json", plain_config(read(converted / "config.json")))
    write(folder / "generation_config.json", {"eos_token_id": [2, 0], "pad_token_id": 0})
    weights = mx.load(str(converted / "model.safetensors"))
    norm = weights["model.norm.weight"]
    weights["model.norm.weight"] = (norm.astype(mx.float32) * SHARPNESS).astype(norm.dtype)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    # As tokenizer.py wrote them: transformers would move the chat template out and name a class that older ones lack.
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)


def adapter(folder, trained):
    config = read(trained / "adapter_config.json")
    write(folder / "adapter_config.json", {key: config[key] for key in ADAPTER_CONFIG})
    weights = mx.load(str(trained / "adapters.safetensors"))
    weights = {name: w * STRENGTH if name.endswith("lora_b") else w for name, w in weights.items()}
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)


if __name__ == "__main__":
    make = {"model": model, "adapter": adapter}[sys.argv[1]]
    replaced(Path(sys.argv[2]), lambda folder: make(folder, *map(Path, sys.argv[3:])))
