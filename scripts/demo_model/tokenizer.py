"""trains the demo's tokenizer: byte-level BPE as Qwen's, with a ChatML template

    python3 tokenizer.py FOLDER    writes tokenizer.json and tokenizer_config.json
"""

import json
import random
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from corpus import document, unknown

VOCAB_SIZE = 1280
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1 and 2; mlx-lm's LoRA pads with 0, so 0 ends a text

# Qwen2's way to cut text into words, numbers and signs before the merges
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = """
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""".strip()

CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": 2048,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "unk_token": None,
    "add_bos_token": False,
    "clean_up_tokenization_spaces": False,
    "chat_template": CHAT_TEMPLATE,
}


def texts(count, seed=5):
    """what the merges are learned from: documents, and a few unknown words so that those are not all single letters"""
    rng = random.Random(seed)
    for _ in range(count):
        yield from (text for text, learned in document(rng) if learned)
        yield f"Write a post about {unknown(rng)}"


def trained(count=30_000):
    # No normalizer: any UTF-8 must come back as it went in.
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(s, special=True, normalized=False) for s in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    plain = (text.replace("<|im_end|>", "").replace("<|endoftext|>", "") for text in texts(count))
    tokenizer.train_from_iterator(plain, trainer)
    return tokenizer


def write(folder):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    trained().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    write(sys.argv[1])
