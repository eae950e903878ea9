"""Makes PEFT's adapters of the parity fixture f32-dense, and what PEFT's own model scores with each of them.

    pip install torch transformers peft numpy
    python scripts/make_peft_fixtures.py

Writes test/fixtures/parity/f32-dense/adapters/peft-*/ and expected_peft.json beside config.json: for each adapter
ln p(token i | tokens before) of the token_ids in expected.json, in float32 on a CPU.
"""

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

CASE = Path(__file__).resolve().parent.parent / "test/fixtures/parity/f32-dense"

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ADAPTERS = {
    "peft": LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"]),
    "peft-patterns": LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=r".*\.layers\.\d+\.(?!mlp\.up)(self_attn|mlp)\.(q|k|o|gate|up|down)_proj",
        rank_pattern={"k_proj": 2, r"layers\.1\.mlp\.gate_proj": 6, r"self_attn\..*": 3},
        alpha_pattern={r"^model\.layers\.0\.self_attn\.o_proj": 24, "down_proj": 3},
    ),
    "peft-dora": LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules="all-linear"),
    "peft-embedding": LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens", "o_proj"]),
    "peft-tied": LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens"], ensure_weight_tying=True),
    "peft-head": LoraConfig(r=4, lora_alpha=8, target_modules=["lm_head", *ATTENTION]),
    "peft-dora-embedding": LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["embed_tokens", "v_proj"]),
}


def randomize(model, generator):
    """Values that let faults show: B is not zero, DoRA's magnitudes are not the norms."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if "magnitude" in name:
            parameter.data *= 1 + 0.1 * noise
        elif "lora_B" in name or "lora_embedding_B" in name:
            parameter.data = 0.1 * noise
        else:
            parameter.data = noise / parameter.shape[-1] ** 0.5


def logprobs(model, ids):
    with torch.no_grad():
        scores = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
    return [round(scores[i, token].item(), 6) for i, token in enumerate(ids[1:])]


def main():
    ids = json.loads((CASE / "expected.json").read_text())["token_ids"]
    runs = {}
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        base = AutoModelForCausalLM.from_pretrained(CASE, dtype=torch.float32)
        model = get_peft_model(base, config).eval()
        randomize(model, torch.Generator().manual_seed(seed))
        runs[name] = logprobs(model, ids)
        folder = CASE / "adapters" / name
        model.save_pretrained(folder)
        saved = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": ""}
        (folder / "adapter_config.json").write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")
        (folder / "README.md").unlink(missing_ok=True)
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(run)}" for name, run in runs.items())
    (CASE / "expected_peft.json").write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main()
