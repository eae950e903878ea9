"""Makes what embeddings and judgements of texts are compared with: mlx-lm's hidden states behind the last norm, pooled.

    pip install "mlx[cpu]==0.32.2" "mlx-lm==0.32.2" numpy
    python scripts/make_embedding_fixtures.py

Writes expected_embeddings.json into cases of test/fixtures/parity, beside what make_fixtures.py made there:

    texts            token ids of three texts, one of them a single token
    yes, no          two token ids
    runs.<run>       run is "base" or "adapter:<name>"; a value for each text
      last, mean     [hidden], the last token's hidden state and the mean of all tokens', not normalized
      judgements     softmax over the last logits of yes and no: p(yes)
"""

import json

import mlx.core as mx

from make_fixtures import Path, load, np, rounded, write_json

PARITY = Path(__file__).resolve().parent.parent / "test/fixtures/parity"
CASES = {
    "f32-tied": ["all-layers", "embedding"],
    "f32-untied": ["all-layers", "head"],
    "f32-dense": [],
    "f32-8bit-g32": [],
    "f32-llama": ["dora"],
    "f32-qwen2": ["last-qv"],
}
LENGTHS = [1, 9, 40]
YES, NO = 17, 201


def run(model, texts):
    """What a model gives for each text."""
    last, mean, judgements = [], [], []
    for ids in texts:
        hidden = np.array(model.model(mx.array([ids]))[0], dtype=np.float64)
        yes, no = (float(model(mx.array([ids]))[0, -1, token]) for token in (YES, NO))
        last.append(rounded(hidden[-1]))
        mean.append(rounded(hidden.mean(axis=0)))
        judgements.append(1 / (1 + np.exp(no - yes)))
    return {"last": last, "mean": mean, "judgements": rounded(judgements)}


def main():
    for case, adapters in CASES.items():
        vocab = json.loads((PARITY / case / "config.json").read_text())["vocab_size"]
        rng = np.random.default_rng(len(case))
        texts = [rng.integers(0, vocab, length).tolist() for length in LENGTHS]
        runs = {"base": run(load(PARITY / case, None), texts)}
        runs |= {f"adapter:{name}": run(load(PARITY / case, name), texts) for name in adapters}
        expected = {"texts": texts, "yes": YES, "no": NO, "runs": runs}
        write_json(PARITY / case / "expected_embeddings.json", expected)


if __name__ == "__main__":
    main()
