"""Makes the parity fixtures: small random checkpoints and adapters, with mlx-lm's answers and the exact ones.

    pip install "mlx[cpu]==0.32.2" "mlx-lm==0.32.2" numpy
    python scripts/make_fixtures.py [CASE ...]      # default: all, into test/fixtures/parity

Each case is a folder: config.json, model.safetensors (or shards and an index), adapters/<name>/, and expected.json:

    dtype                      of scales, norms and dense weights
    token_ids, greedy_prompt   what was asked
    eos_token_ids              what ends a generation; greedy goes on regardless
    runs.<run>                 run is "base" or "adapter:<name>"
      logprobs, exact          ln p(token i | tokens before), by mlx-lm and without any rounding
      greedy, greedy_margins   16 tokens, and how far each logit is ahead of the second best
      greedy_agreed            of them, from the first, the exact answer has so many too, none by a hair
      mlx_to_exact             mean |logprobs - exact|

The seed of a case is its name.
"""

import json
import shutil
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import _get_classes, load_model

from exact_decoder import ExactDecoder

mx.set_default_device(mx.cpu)

GREEDY_TOKENS = 16
PROMPT_CANDIDATES = 32

BASE_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 256,
}


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "head_dim": None,
    "rope_theta": 10000.0,
    "use_sliding_window": None,
}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "attention_bias": None,
    "head_dim": None,
    "layer_types": ["full_attention", "full_attention"],
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 256}


@dataclass
class Adapter:
    """An adapter: `spread` is the standard deviation of B, `keys` None means every linear layer."""

    name: str
    rank: int
    scale: float
    spread: float
    num_layers: int = -1
    keys: list | None = None
    kind: str = "lora"
    dtype: mx.Dtype = mx.float32

    def config(self):
        """What mlx-lm writes to adapter_config.json, as far as loading needs it."""
        parameters = {"rank": self.rank, "dropout": 0.0, "scale": self.scale}
        if self.keys is not None:
            parameters["keys"] = self.keys
        return {"fine_tune_type": self.kind, "num_layers": self.num_layers, "lora_parameters": parameters}


@dataclass
class Case:
    """A checkpoint: `overrides` are listed in config.json, `unlisted` only show in the tensors; False is dense."""

    name: str
    dtype: mx.Dtype = mx.float32
    bits: int | None = 4
    group_size: int = 64
    mode: str | None = None
    config: dict = field(default_factory=dict)
    overrides: dict = field(default_factory=dict)
    unlisted: dict = field(default_factory=dict)
    quantization_keys: tuple = ("quantization",)
    shards: int = 1
    eos: str = "single"
    adapters: list = field(default_factory=list)
    # An adapter that is also there in PEFT's format.
    peft: str | None = None

    def rng(self):
        """The case's own source of random numbers."""
        return np.random.default_rng(zlib.crc32(self.name.encode()))

    def least_margin(self):
        """A greedy token this far ahead is not a matter of rounding."""
        return 0.01 if self.dtype == mx.float32 else 0.1

    def full_config(self, eos_token_id):
        """config.json; a None in `config` removes a field."""
        config = {**BASE_CONFIG, **self.config, "eos_token_id": eos_token_id, "torch_dtype": dtype_name(self.dtype)}
        removed = [key for key, value in self.config.items() if value is None]
        if self.bits is not None:
            mode = {"mode": self.mode} if self.mode else {}
            settings = {"group_size": self.group_size, "bits": self.bits, **mode, **self.overrides}
            config |= {key: settings for key in self.quantization_keys}
        return {key: value for key, value in sorted(config.items()) if key not in removed}


ALL_LAYERS = Adapter("all-layers", rank=8, scale=20.0, spread=0.008)
LAST_QV = Adapter(
    "last-qv", rank=4, scale=10.0, spread=0.15, num_layers=1, keys=["self_attn.q_proj", "self_attn.v_proj"]
)
DORA = Adapter("dora", rank=4, scale=20.0, spread=0.015, kind="dora")
HALF = Adapter("all-layers-bf16", rank=8, scale=20.0, spread=0.008, dtype=mx.bfloat16)
EMBEDDING = Adapter(
    "embedding", rank=4, scale=10.0, spread=0.05, keys=["model.embed_tokens", "self_attn.q_proj"]
)
HEAD = Adapter("head", rank=4, scale=10.0, spread=0.05, num_layers=1, keys=["lm_head", "mlp.down_proj"])

UNTIED = {"tie_word_embeddings": False}
WIDE = {"hidden_size": 128, "head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
HEAD_DIM = {"head_dim": 32, "num_attention_heads": 6, "num_key_value_heads": 2}

LAST_OF_ALL = Adapter("last-all", rank=4, scale=10.0, spread=0.1, num_layers=1)

NO_WINDOW = {"sliding_window": None, "use_sliding_window": None}
LONG = {"num_hidden_layers": 4, "max_position_embeddings": 256}


def family(name, model_type, dtype=mx.float32, adapters=(ALL_LAYERS, LAST_OF_ALL), eos="single", peft=None, **config):
    """A case of a family beside Qwen3: `qkv_proj` and the like are in its adapters, whatever they are called."""
    base = {"model_type": model_type, "architectures": None, "attention_bias": None, "rope_theta": 10000.0}
    case = base | NO_WINDOW | config
    return Case(name, dtype=dtype, config=case, adapters=list(adapters), eos=eos, peft=peft)


FUSED = {
    "dtype": mx.bfloat16,
    "adapters": (ALL_LAYERS,),
    "hidden_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
WINDOWS = LONG | {"sliding_window": 8}
YARN = {
    "rope_theta": 1000.0,
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
    "mscale": 0.8,
    "mscale_all_dim": 0.4,
}
GEMMA = {"head_dim": 32, "hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 20.0}
GRANITE = {
    "head_dim": None,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_multiplier": 0.4,
    "embedding_multiplier": 0.6,
    "residual_multiplier": 0.6,
    "logits_scaling": 0.7,
}
LONGROPE = {
    "head_dim": None,
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 32,
    "rope_scaling": {"type": "longrope", "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 4.0], "short_factor": [1.0] * 6},
}

FAMILY_CASES = [
    family(
        "f32-mistral-windows",
        "mistral",
        **WINDOWS,
        layer_types=["sliding_attention", "full_attention"] * 2,
        head_dim=None,
        peft="all-layers",
    ),
    family("f32-phi3", "phi3", **UNTIED, **LONGROPE, peft="all-layers", adapters=(ALL_LAYERS, LAST_OF_ALL, DORA)),
    family("bf16-phi3", "phi3", dtype=mx.bfloat16, **UNTIED, head_dim=None),
    family("f32-smollm3", "smollm3", **LONG, head_dim=None),
    family("f32-granite", "granite", **GRANITE),
    family("bf16-granite", "granite", dtype=mx.bfloat16, **GRANITE),
    family("f32-ernie", "ernie4_5", use_bias=True, peft="all-layers"),
    family(
        "f32-hunyuan",
        "hunyuan_v1_dense",
        use_qk_norm=True,
        rope_scaling={"type": "dynamic", "alpha": 50.0, "factor": 1.0},
    ),
    family(
        "f32-ministral3",
        "ministral3",
        rope_theta=None,
        rope_parameters=YARN | {"llama_4_scaling_beta": 0.4},
    ),
    family("f32-glm4", "glm4", **UNTIED, attention_bias=True, partial_rotary_factor=0.5, peft="all-layers"),
    family("f32-olmo2", "olmo2", **UNTIED, adapters=(ALL_LAYERS, LAST_OF_ALL, DORA)),
    family("f32-olmo3", "olmo3", **UNTIED, **WINDOWS, rope_scaling={k: v for k, v in YARN.items() if k != "rope_theta"}),
    family("f32-gemma2", "gemma2", **GEMMA, attn_logit_softcapping=4.0, final_logit_softcapping=20.0),
    family("bf16-gemma2", "gemma2", dtype=mx.bfloat16, **GEMMA),
    family(
        "f32-gemma3",
        "gemma3_text",
        **WINDOWS,
        **GEMMA,
        sliding_window_pattern=3,
        rope_local_base_freq=100.0,
        tie_word_embeddings=None,
    ),
    family(
        "bf16-gemma3",
        "gemma3_text",
        dtype=mx.bfloat16,
        **WINDOWS,
        **GEMMA,
        sliding_window_pattern=2,
        rope_local_base_freq=100.0,
    ),
    family("f32-exaone4", "exaone4", **UNTIED, **WINDOWS, sliding_window_pattern="LLLG"),
    family(
        "f32-cohere2",
        "cohere2",
        **WINDOWS,
        sliding_window_pattern=4,
        layer_norm_eps=1e-5,
        rms_norm_eps=None,
        logit_scale=0.6,
    ),
    family("bf16-cohere2", "cohere2", dtype=mx.bfloat16, **WINDOWS, sliding_window_pattern=2, logit_scale=0.6),
    # What CUDA's fused step serves: heads of 64 or more.
    family("bf16-granite-fused", "granite", **FUSED, **GRANITE | {"attention_bias": True, "mlp_bias": True}),
    family("bf16-smollm3-fused", "smollm3", **FUSED, no_rope_layers=[1, 0], head_dim=None),
    family(
        "bf16-mistral-windows-fused",
        "mistral",
        **FUSED,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        head_dim=None,
    ),
    family(
        "bf16-ministral3-fused",
        "ministral3",
        **FUSED,
        rope_theta=None,
        head_dim=64,
        rope_parameters=YARN | {"llama_4_scaling_beta": 0.4},
    ),
    family(
        "bf16-gemma3-fused",
        "gemma3_text",
        **FUSED,
        **GEMMA | {"head_dim": 256},
        sliding_window=8,
        sliding_window_pattern=2,
        rope_local_base_freq=100.0,
    ),
]

CASES = [
    Case("f32-tied", adapters=[ALL_LAYERS, LAST_QV, DORA, EMBEDDING]),
    Case(
        "f32-untied",
        config={**UNTIED, "vocab_size": 270, "rope_theta": 10000.0, "rms_norm_eps": 1e-3},
        eos="generation_config",
        adapters=[ALL_LAYERS, LAST_QV, HEAD],
    ),
    Case("f32-three-shards", config={**UNTIED, "num_hidden_layers": 3}, shards=3, group_size=32, mode="affine"),
    Case("f32-2bit-g128", bits=2, group_size=128, config={"hidden_size": 128, "head_dim": 32}),
    Case("f32-3bit-g32", bits=3, group_size=32, config={"hidden_size": 96, "rope_theta": 500000.0}),
    Case("f32-5bit-untied", bits=5, config=UNTIED),
    Case(
        "f32-6bit-g128",
        bits=6,
        group_size=128,
        config={"hidden_size": 128, "head_dim": 32, "num_key_value_heads": 1},
        quantization_keys=("quantization_config",),
    ),
    Case("f32-8bit-g32", bits=8, group_size=32, config={"num_key_value_heads": 4, "num_hidden_layers": 3}),
    Case("f32-head-dim", config={**HEAD_DIM, "rope_theta": 100000.0}),
    Case("f32-eos-list", config={"num_key_value_heads": 1}, eos="list"),
    Case("f32-dense", bits=None, config={"rms_norm_eps": 1e-2, "intermediate_size": 96}),
    Case(
        "f32-rope-parameters",
        config={"rope_theta": None, "rope_parameters": {"rope_theta": 20000.0, "rope_type": "default"}},
    ),
    Case(
        "f32-overrides",
        config=UNTIED,
        overrides={
            "model.embed_tokens": {"group_size": 32, "bits": 8},
            "model.layers.0.self_attn.v_proj": {"group_size": 64, "bits": 6},
            "model.layers.0.mlp.up_proj": False,
            "model.layers.1.mlp.down_proj": {"group_size": 128, "bits": 3},
            "lm_head": False,
        },
        unlisted={"model.layers.1.self_attn.o_proj": False},
        adapters=[ALL_LAYERS],
    ),
    Case("f32-unlisted", unlisted={"model.layers.0.mlp.gate_proj": {"group_size": 32, "bits": 8}}),
    Case(
        "bf16-4bit",
        dtype=mx.bfloat16,
        mode="affine",
        config={"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
        quantization_keys=("quantization", "quantization_config"),
        adapters=[ALL_LAYERS, LAST_QV, DORA, HALF],
    ),
    Case("f16-4bit", dtype=mx.float16, config=WIDE | {"rope_theta": 10000.0}),
    Case(
        "bf16-8bit-untied",
        dtype=mx.bfloat16,
        bits=8,
        group_size=32,
        config={**UNTIED, **HEAD_DIM},
        adapters=[LAST_QV],
    ),
    Case(
        "bf16-overrides",
        dtype=mx.bfloat16,
        config=UNTIED,
        overrides={
            "model.embed_tokens": {"group_size": 64, "bits": 8},
            "model.layers.0.mlp.down_proj": {"group_size": 32, "bits": 8},
            "model.layers.1.self_attn.q_proj": False,
            "lm_head": {"group_size": 64, "bits": 6, "mode": "affine"},
        },
        adapters=[ALL_LAYERS, LAST_QV],
    ),
    Case("bf16-dense", dtype=mx.bfloat16, bits=None, config=UNTIED),
    Case("f32-llama", config=LLAMA | UNTIED, adapters=[ALL_LAYERS, LAST_QV, DORA], peft="all-layers"),
    Case("f32-llama-biases", config=LLAMA | {"attention_bias": True, "mlp_bias": True}, adapters=[ALL_LAYERS, DORA]),
    Case("f32-llama-head-dim", config=LLAMA | HEAD_DIM | {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    Case(
        "f32-llama-dynamic",
        config=LLAMA | {"max_position_embeddings": 24, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    ),
    Case(
        "f32-llama3",
        config=LLAMA | UNTIED | {
            "rope_theta": 500.0,
            "rope_scaling": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 64,
                "rope_type": "llama3",
            },
        },
    ),
    Case("bf16-mistral", dtype=mx.bfloat16, config=MISTRAL | UNTIED | WIDE, adapters=[ALL_LAYERS]),
    Case("f32-qwen2", config=QWEN2, adapters=[ALL_LAYERS, LAST_QV, DORA], peft="all-layers"),
    Case(
        "f32-qwen2-yarn",
        bits=None,
        config=QWEN2 | UNTIED | {
            "rope_theta": 10000.0,
            "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 64, "type": "yarn"},
        },
        adapters=[DORA],
    ),
    Case("f32-qwen3-yarn", config={
        "rope_scaling": {"factor": 2.0, "original_max_position_embeddings": 32, "rope_type": "yarn"},
        "rope_theta": 1000.0,
    }),
    Case(
        "bf16-qwen2",
        dtype=mx.bfloat16,
        config=QWEN2 | {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
        adapters=[ALL_LAYERS, LAST_QV],
    ),
    *FAMILY_CASES,
]


def dtype_name(dtype):
    """mlx.core.float32 -> float32."""
    return str(dtype).rsplit(".", 1)[-1]


def write_json(path, value):
    """Writes a value as JSON, lists of numbers on one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(format_json(value) + "\n")


def format_json(value, indent=""):
    """JSON with one line for each field of an object."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value)
    deeper = indent + "  "
    fields = [f"{deeper}{json.dumps(key)}: {format_json(item, deeper)}" for key, item in value.items()]
    return "{\n" + ",\n".join(fields) + f"\n{indent}}}"


# The checkpoint


def random_parameter(name, shape, rng, gemma):
    """A weight that lets faults show: wide logits, norms away from 1 (Gemma's are one more)."""
    if name.endswith(".bias"):
        return rng.normal(0, 0.5, shape)
    if len(shape) == 1:
        return rng.uniform(0.5, 1.5, shape) - gemma
    if name.startswith(("model.embed_tokens", "lm_head")):
        # Gemma's embeddings are multiplied: they would drown what the layers add.
        return rng.normal(0, 0.15 if gemma else 0.35, shape)
    return rng.normal(0, rng.uniform(1.0, 1.5) / np.sqrt(shape[-1]), shape)


def random_model(case, rng):
    """A model with random weights, quantized as the case says."""
    config = case.full_config(0)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    gemma = config["model_type"].startswith("gemma")
    shapes = sorted((name, value.shape) for name, value in tree_flatten(model.parameters()))
    weights = [(name, mx.array(random_parameter(name, shape, rng, gemma)).astype(case.dtype)) for name, shape in shapes]
    model.load_weights(weights)
    if case.bits is not None:
        settings = {**case.overrides, **case.unlisted}
        predicate = lambda path, module: settings.get(path, hasattr(module, "to_quantized"))
        nn.quantize(model, case.group_size, case.bits, class_predicate=predicate)
    return model


def save_weights(model, folder, config, shards):
    """Writes model.safetensors, or shards that cut across layers and modules, and their index."""
    weights = dict(sorted(tree_flatten(model.parameters())))
    # mlx-lm's Gemma 3 has a head until it is given weights without one.
    if config.get("tie_word_embeddings"):
        weights = {name: value for name, value in weights.items() if not name.startswith("lm_head.")}
    if shards == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
        return
    names, weight_map = list(weights), {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in names[index::shards]}
        mx.save_safetensors(str(folder / file), part, metadata={"format": "mlx"})
        weight_map |= {name: file for name in part}
    size = sum(value.nbytes for value in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


# The adapters


def random_adapter(name, value, adapter, rng):
    """A as mlx-lm starts it, B of the adapter's spread, DoRA magnitudes near the weight's norms."""
    if name.endswith("lora_a"):
        bound = 1 / np.sqrt(value.shape[0])
        return rng.uniform(-bound, bound, value.shape)
    if name.endswith("lora_b"):
        return rng.normal(0, adapter.spread, value.shape)
    return np.array(value) * rng.uniform(0.8, 1.2, value.shape)


def save_adapter(case_folder, adapter, rng):
    """Puts LoRA layers into the model as mlx-lm's training does, and saves what they would train."""
    model = load(case_folder)
    model.freeze()
    config = adapter.config()
    linear_to_lora_layers(model, adapter.num_layers, config["lora_parameters"], use_dora=adapter.kind == "dora")
    trained = sorted(tree_flatten(model.trainable_parameters()))
    values = {name: random_adapter(name, value, adapter, rng) for name, value in trained}
    weights = {name: mx.array(value).astype(adapter.dtype) for name, value in values.items()}
    folder = adapter_folder(case_folder, adapter.name)
    write_json(folder / "adapter_config.json", config)
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)


def save_as_peft(case_folder, name, new_name):
    """The same adapter as PEFT writes it: transposed, and its scale as lora_alpha / r."""
    source, folder = adapter_folder(case_folder, name), adapter_folder(case_folder, new_name)
    parameters = json.loads((source / "adapter_config.json").read_text())["lora_parameters"]
    rank, alpha = parameters["rank"], parameters["scale"] * parameters["rank"]
    names = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
    tensors, targets = {}, set()
    for path, value in mx.load(str(source / "adapters.safetensors")).items():
        module, role = path.rsplit(".", 1)
        tensors[f"base_model.model.{module}.{names[role]}"] = mx.contiguous(value.T)
        targets.add(module.rsplit(".", 1)[-1])
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": sorted(targets)}
    write_json(folder / "adapter_config.json", config)
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors)


def adapter_folder(case_folder, name):
    return case_folder / "adapters" / name


# mlx-lm's answers


def load(folder, adapter=None):
    """mlx-lm's model from a folder; it takes `quantization_config` alone for another maker's, so that is renamed."""
    config = json.loads((folder / "config.json").read_text())
    settings = {"quantization": config["quantization_config"]} if "quantization_config" in config else None
    model, _ = load_model(folder, model_config=settings)
    if adapter is not None:
        load_adapters(model, str(adapter_folder(folder, adapter)))
    model.eval()
    return model


def mlx_logprobs(model, ids):
    """ln p(token i | the tokens before it) from one pass over all tokens but the last."""
    logits = model(mx.array([ids[:-1]]))[0].astype(mx.float32)
    logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    return logprobs[np.arange(len(ids) - 1), ids[1:]]


def mlx_greedy(model, prompt, count):
    """The greedy continuation through mlx-lm's cache, and each token's lead over the second best."""
    cache, ids, tokens, margins = make_prompt_cache(model), list(prompt), [], []
    for _ in range(count):
        logits = np.array(model(mx.array([ids]), cache=cache)[0, -1].astype(mx.float32))
        second, best = np.sort(logits)[-2:]
        margins.append(float(best - second))
        ids = [int(logits.argmax())]
        tokens += ids
    return tokens, margins


# What is expected


def rounded(values):
    return [round(float(value), 6) for value in values]


def agreed_steps(tokens, margins, exact_tokens, exact_margins, least_margin):
    """How many greedy tokens mlx-lm and the exact answer share before either of them is a close call."""
    for step, lead in enumerate(map(min, margins, exact_margins)):
        if tokens[step] != exact_tokens[step] or lead < least_margin:
            return step
    return len(tokens)


def greedy_answers(mlx, exact, prompt, least_margin):
    """The part of a run's entry that is about greedy tokens."""
    tokens, margins = mlx_greedy(mlx, prompt, GREEDY_TOKENS)
    agreed = agreed_steps(tokens, margins, *exact.greedy(prompt, GREEDY_TOKENS), least_margin)
    return {"greedy": tokens, "greedy_margins": rounded(margins), "greedy_agreed": agreed}


def prompt_worth(models, prompt, case):
    """How far the runs' greedy tokens are exact (in 16 bits, 4 of them will do), then how many different ones."""
    runs = [greedy_answers(mlx, exact, prompt, case.least_margin()) for mlx, exact in models.values()]
    steps = min(run["greedy_agreed"] for run in runs)
    distinct = sum(len(set(run["greedy"][: run["greedy_agreed"]])) for run in runs)
    return (steps if case.dtype == mx.float32 else min(steps, 4), distinct, steps)


def choose_prompt(models, case, rng):
    """The random prompt whose continuations show most and hang least on rounding."""
    vocab_size = case.full_config(0)["vocab_size"]
    prompts = [rng.integers(0, vocab_size, rng.integers(4, 9)).tolist() for _ in range(PROMPT_CANDIDATES)]
    return max(prompts, key=lambda prompt: prompt_worth(models, prompt, case))


def answers(mlx, exact, ids, greedy):
    """One run's entry in expected.json."""
    logprobs, truth = mlx_logprobs(mlx, ids), exact.logprobs(ids)
    distance = round(float(np.abs(logprobs - truth).mean()), 6)
    return {"logprobs": rounded(logprobs), "exact": rounded(truth), **greedy, "mlx_to_exact": distance}


def load_runs(folder, adapters):
    """Run name -> (mlx-lm's model, the exact model)."""
    runs = {"base": (load(folder), ExactDecoder(folder))}
    for adapter in adapters:
        path = adapter_folder(folder, adapter.name)
        runs[f"adapter:{adapter.name}"] = (load(folder, adapter.name), ExactDecoder(folder, path))
    return runs


def write_eos(case, folder, runs, vocab_size):
    """Settles the eos ids: none in a greedy continuation, except where the case is about a list of them."""
    seen = {token for run in runs.values() for token in run["greedy"]}
    unused = next(token for token in reversed(range(vocab_size)) if token not in seen)
    ids = [unused] if case.eos == "single" else [unused, late_token(runs["base"]["greedy"])]
    write_json(folder / "config.json", case.full_config(ids if case.eos == "list" else unused))
    if case.eos == "generation_config":
        write_json(folder / "generation_config.json", {"eos_token_id": ids})
    return ids


def late_token(tokens):
    """The token that first appears latest."""
    return max(tokens, key=tokens.index)


def make_expected(case, folder, rng):
    """Asks mlx-lm and the exact model, and writes expected.json."""
    vocab_size = case.full_config(0)["vocab_size"]
    ids = rng.integers(0, vocab_size, rng.integers(28, 40)).tolist()
    models = load_runs(folder, case.adapters)
    prompt = choose_prompt(models, case, rng)
    runs = {}
    for name, (mlx, exact) in models.items():
        runs[name] = answers(mlx, exact, ids, greedy_answers(mlx, exact, prompt, case.least_margin()))
    if case.peft:
        save_as_peft(folder, case.peft, f"{case.peft}-peft")
        runs[f"adapter:{case.peft}-peft"] = runs[f"adapter:{case.peft}"]
    eos = write_eos(case, folder, runs, vocab_size)
    asked = {"token_ids": ids, "greedy_prompt": prompt, "eos_token_ids": eos}
    write_json(folder / "expected.json", {"dtype": dtype_name(case.dtype), **asked, "runs": runs})
    return runs


# Checks and the report


def check(case, name, run, base):
    """A float32 case agrees with the exact answer, and an adapter matters."""
    worst = np.abs(np.subtract(run["logprobs"], run["exact"])).max()
    if case.dtype == mx.float32:
        assert worst < 2e-4, f"{case.name} {name}: mlx-lm is {worst} from the exact answer"
        assert run["greedy_agreed"] == GREEDY_TOKENS, f"{case.name} {name}: greedy tokens differ"
    change = np.abs(np.subtract(run["logprobs"], base["logprobs"])).mean()
    assert name == "base" or change > 0.1, f"{case.name} {name}: the adapter changes log-probabilities by {change}"
    distances = f"mlx-exact mean {run['mlx_to_exact']:.6f} worst {worst:.6f}"
    tokens = f"agreed {run['greedy_agreed']} distinct {len(set(run['greedy']))}"
    print(f"  {name:24} {distances}  std {np.std(run['exact']):.2f}  adapter {change:.2f}  {tokens}")


def make_case(case, out):
    """Makes one case's folder and checks it."""
    folder, rng = out / case.name, case.rng()
    shutil.rmtree(folder, ignore_errors=True)
    write_json(folder / "config.json", case.full_config(0))
    save_weights(random_model(case, rng), folder, case.full_config(0), case.shards)
    for adapter in case.adapters:
        save_adapter(folder, adapter, rng)
    runs = make_expected(case, folder, rng)
    print(f"{case.name} ({folder_size(folder) / 1024:.0f} KB)")
    for name, run in runs.items():
        check(case, name, run, runs["base"])


def folder_size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main():
    out = Path(__file__).resolve().parent.parent / "test" / "fixtures" / "parity"
    cases = [case for case in CASES if case.name in sys.argv[1:]] if sys.argv[1:] else CASES
    for case in cases:
        make_case(case, out)
    print(f"{len(cases)} cases, {folder_size(out) / 1024:.0f} KB")


if __name__ == "__main__":
    main()
