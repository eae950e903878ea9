"""Makes DoRA adapters of an embedding and of a head, and what mlx-lm scores with each of them.

    pip install "mlx[cpu]==0.32.2" "mlx-lm==0.32.2" numpy
    python scripts/make_dora_fixtures.py

Writes adapters/dora-*/ and expected_dora.json into two cases of test/fixtures/parity, beside what make_fixtures.py made
there. The embedding is a dense one: mlx-lm's DoRA fails on a quantized embedding.
"""

import json

from make_fixtures import Adapter, Path, load, mlx_logprobs, np, rounded, save_adapter

PARITY = Path(__file__).resolve().parent.parent / "test/fixtures/parity"
KEYS = {
    "f32-dense": ("dora-embedding", ["model.embed_tokens", "self_attn.q_proj"]),
    "f32-untied": ("dora-head", ["lm_head", "mlp.down_proj"]),
}


def main():
    for case, (name, keys) in KEYS.items():
        adapter = Adapter(name, rank=4, scale=10.0, spread=0.05, keys=keys, kind="dora")
        save_adapter(PARITY / case, adapter, np.random.default_rng(1))
        ids = json.loads((PARITY / case / "expected.json").read_text())["token_ids"]
        scores = {name: rounded(mlx_logprobs(load(PARITY / case, name), ids))}
        (PARITY / case / "expected_dora.json").write_text(json.dumps(scores) + "\n")


if __name__ == "__main__":
    main()
