"""What a config.json says of a model's arithmetic, for the exact decoder: read off mlx-lm's models, apart from the
engine's own reading of them."""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Form:
    """A model: `windows` and `rotated` have an entry a layer."""

    config: dict
    eps: float
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    tied: bool
    scale: float
    # The names of a layer's norms: before and behind attention, before and behind the MLP.
    norms: tuple = ("input_layernorm", None, "post_attention_layernorm", None)
    norm_offset: float = 0.0
    centered: bool = False
    qk_norms: tuple = ("q_norm", "k_norm")
    norm_all_heads: bool = False
    norm_rotated: bool = False
    fused: bool = False
    parallel: bool = False
    gelu: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    score_cap: float | None = None
    logit_cap: float | None = None
    # beta and context of queries that grow
    query_growth: tuple | None = None
    rotated_dim: int = 0
    interleaved: bool = False
    windows: list = field(default_factory=list)
    rotated: list = field(default_factory=list)
    # Layers with a window have this base, unscaled.
    local_theta: float | None = None
    plain_in_windows: bool = False

    def rope_settings(self, layer):
        """theta and scaling of a layer's rotation."""
        scaling = dict(self.config.get("rope_parameters") or self.config.get("rope_scaling") or {})
        theta = self.config.get("rope_theta") or scaling.get("rope_theta")
        if self.windows[layer] and self.local_theta:
            return self.local_theta, {}
        return theta, {} if self.windows[layer] and self.plain_in_windows else scaling


def layer_windows(config, window, is_windowed):
    kinds = config.get("layer_types")
    named = [kind == "sliding_attention" for kind in kinds] if kinds else None
    return [window if (named[i] if named else is_windowed(i)) else None for i in range(config["num_hidden_layers"])]


def form(config):
    """The form of a model."""
    kind, layers = config["model_type"], config["num_hidden_layers"]
    heads, window = config["num_attention_heads"], config.get("sliding_window")
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    tied = {"gemma2": True, "cohere2": True, "glm4": False}.get(kind, config.get("tie_word_embeddings"))
    made = Form(
        config=config,
        eps=config.get("rms_norm_eps") or config.get("layer_norm_eps"),
        heads=heads,
        kv_heads=config["num_key_value_heads"],
        head_dim=head_dim,
        layers=layers,
        tied=tied,
        scale=head_dim**-0.5,
        rotated_dim=head_dim,
        windows=[None] * layers,
        rotated=[True] * layers,
    )
    for name, value in FAMILIES.get(kind, lambda config: {})(config).items():
        setattr(made, name, value)
    if kind in ("llama", "mistral", "ministral3"):
        made.windows = layer_windows(config, window, lambda layer: kind == "mistral")
    return made


def smollm3(config):
    interval = config.get("no_rope_layer_interval", 4)
    layers = range(config["num_hidden_layers"])
    return {"rotated": config.get("no_rope_layers") or [(i + 1) % interval != 0 for i in layers]}


def phi3(config):
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    rotated = int(head_dim * config.get("partial_rotary_factor", 1.0))
    return {"fused": True, "rotated_dim": rotated, "windows": layer_windows(config, config.get("sliding_window"), lambda i: True)}


def granite(config):
    return {
        "scale": config["attention_multiplier"],
        "embedding_scale": config["embedding_multiplier"],
        "residual_scale": config["residual_multiplier"],
        "logit_scale": 1 / config["logits_scaling"],
    }


def hunyuan(config):
    return {"norm_rotated": True, "qk_norms": ("query_layernorm", "key_layernorm")}


def ministral3(config):
    rope = config["rope_parameters"]
    return {"query_growth": (rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"])}


def glm4(config):
    norms = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
    rotated = int(config["head_dim"] * config["partial_rotary_factor"])
    return {"norms": norms, "fused": True, "rotated_dim": rotated, "interleaved": True}


BEHIND = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
FOUR = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


def olmo2(config):
    return {"norms": BEHIND, "norm_all_heads": True}


def olmo3(config):
    windows = layer_windows(config, config["sliding_window"], lambda i: (i + 1) % 4 != 0)
    return olmo2(config) | {"windows": windows, "plain_in_windows": True}


def gemma2(config):
    return {
        "norms": FOUR,
        "norm_offset": 1.0,
        "gelu": True,
        "scale": config["query_pre_attn_scalar"] ** -0.5,
        "embedding_scale": config["hidden_size"] ** 0.5,
        "score_cap": config.get("attn_logit_softcapping", 50.0),
        "logit_cap": config.get("final_logit_softcapping", 30.0),
        "windows": layer_windows(config, config.get("sliding_window"), lambda i: i % 2 == 0),
    }


def bfloat16(value):
    """Rounded to bfloat16, ties to even."""
    bits = int(np.float32(value).view(np.uint32))
    bits += 0x7FFF + (bits >> 16 & 1)
    return float(np.uint32(bits & 0xFFFF0000).view(np.float32))


def gemma3(config):
    pattern = config["sliding_window_pattern"]
    return {
        "norms": FOUR,
        "norm_offset": 1.0,
        "gelu": True,
        "scale": config["query_pre_attn_scalar"] ** -0.5,
        "embedding_scale": bfloat16(config["hidden_size"] ** 0.5),
        "windows": layer_windows(config, config["sliding_window"], lambda i: (i + 1) % pattern != 0),
        "local_theta": config["rope_local_base_freq"],
    }


def exaone4(config):
    pattern = config.get("sliding_window_pattern")
    layers = range(config["num_hidden_layers"])
    local = [pattern[i % len(pattern)] == "L" if pattern else False for i in layers]
    windows = [config["sliding_window"] if own else None for own in local]
    return {"norms": BEHIND, "windows": windows, "rotated": [own or not pattern for own in local]}


def cohere2(config):
    pattern = config["sliding_window_pattern"]
    windows = layer_windows(config, config["sliding_window"], lambda i: (i + 1) % pattern != 0)
    return {
        "norms": ("input_layernorm", None, None, None),
        "centered": True,
        "parallel": True,
        "interleaved": True,
        "logit_scale": config["logit_scale"],
        "windows": windows,
        "rotated": [window is not None for window in windows],
    }


FAMILIES = {
    "smollm3": smollm3,
    "phi3": phi3,
    "granite": granite,
    "ernie4_5": lambda config: {"interleaved": True},
    "hunyuan_v1_dense": hunyuan,
    "ministral3": ministral3,
    "glm4": glm4,
    "olmo2": olmo2,
    "olmo3": olmo3,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "exaone4": exaone4,
    "cohere2": cohere2,
}
