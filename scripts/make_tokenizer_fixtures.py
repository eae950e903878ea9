"""writes test/fixtures/tokenizers.json: small tokenizers of the families' kinds, and what transformers makes of texts

    python scripts/make_tokenizer_fixtures.py      # needs transformers

Three models are learnt from the texts themselves, without a pre-tokenizer: their tokens span words, so that every
place where a kind cuts a text shows in the ids. Each tokenizer is one of these models with the parts of its kind, as in
the `tokenizer.json` of a family. Its cases have ids, and the text that transformers makes of them: null where that is
the text that was encoded.
"""

import json
import sys
from pathlib import Path

import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import TokenizersBackend

sys.path.insert(0, str(Path(__file__).parent))
from conversations import TEXTS

transformers.logging.set_verbosity_error()
TARGET = Path(__file__).parent.parent / "test/fixtures/tokenizers.json"

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%s"
LLAMA3 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}"
QWEN2 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{REST}"
GPT4O = CASED % ((CONTRACTIONS + "?",) * 2) + "|\\p{N}{1,3}|" + REST.replace("\\n]*", "\\n/]*", 1)
SIGN = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
SIGN_BACK = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
DIGITS = {"type": "Digits", "individual_digits": True}


def sequence(name, *parts):
    return {"type": "Sequence", name: list(parts)}


def split(pattern, behavior="Isolated", invert=False):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}


def bytes_as_characters(use_regex):
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def byte_level(*splits, normalizer=None, use_regex=False, **fields):
    pre_tokenizer = sequence("pretokenizers", *splits, bytes_as_characters(use_regex))
    return {"model": "bytes", "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
            "decoder": bytes_as_characters(True), **fields}


def sentence_piece(normalizer=None, pre_tokenizer=None, strip=True, model="pieces", **fields):
    decoders = [SIGN_BACK, {"type": "ByteFallback"}, {"type": "Fuse"}] + [STRIP] * strip
    return {"model": model, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
            "decoder": sequence("decoders", *decoders), **fields}


def metaspace(scheme, split):
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}


def unigram(pre_tokenizer, **fields):
    spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    return {"model": "unigram", "normalizer": sequence("normalizers", {"type": "NFKC"}, spaces),
            "pre_tokenizer": pre_tokenizer, "decoder": pre_tokenizer, **fields}


PREPEND = sequence("normalizers", {"type": "Prepend", "prepend": "▁"}, SIGN)

KINDS = {
    "gpt2": byte_level(use_regex=True),
    "llama3": byte_level(split(LLAMA3), ignore_merges=True),
    "olmo2": byte_level(split(LLAMA3), {"type": "Split", "pattern": {"String": "x"}, "behavior": "MergedWithNext", "invert": False}),
    "gpt35": byte_level(split(LLAMA3, "Removed", True)),
    "qwen2": byte_level(split(QWEN2), normalizer={"type": "NFC"}),
    "qwen35": byte_level(split(QWEN2.replace("\\p{L}+", "[\\p{L}\\p{M}]+").replace("]\\p{L}\\p{N}]+", "]\\p{L}\\p{M}\\p{N}]+")),
                         normalizer={"type": "NFC"}),
    "gpt4o": byte_level(split(GPT4O)),
    "tekken": byte_level(split(CASED % ("", "") + "|\\p{N}|" + REST.replace("\\n]*", "\\n/]*", 1)), ignore_merges=True),
    "cohere": byte_level(DIGITS, normalizer={"type": "NFC"}, use_regex=True),
    "granite": byte_level(DIGITS, use_regex=True),
    "exaone": byte_level(split(
        rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?"
        r"|\s*[\r\n]|\s+(?!\S)|\s+"), normalizer={"type": "NFC"}),
    "hunyuan": byte_level(
        split(r"\p{N}{1,3}"), split("[一-龥\u3040-ゟ゠-ヿ]+"),
        split("[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
              "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+")),
    "deepseek_coder": byte_level(
        split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split("[一-龥ࠀ-一가-퟿]+"), DIGITS),
    "bailing": byte_level(split(
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")),
    "groups_of_digits": byte_level(split(r"\d{1,3}(?=(?:\d{3})*\b)"), split(GPT4O)),
    "claude": byte_level(normalizer={"type": "NFKC"}, use_regex=True),
    "llama_legacy": sentence_piece(PREPEND),
    "llama": sentence_piece(pre_tokenizer=metaspace("first", False)),
    "llama_always": sentence_piece(pre_tokenizer=metaspace("always", True)),
    "phi3": sentence_piece(PREPEND, rstrip=True),
    "gemma": sentence_piece(SIGN, {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}, strip=False),
    "ernie": sentence_piece(SIGN, strip=False),
    "unigram": unigram(metaspace("always", True)),
    "unigram_first": unigram(metaspace("first", True), lstrip=True),
    "unigram_bytes": sentence_piece(PREPEND, model="unigram"),
}


def token(content, special=True, **fields):
    return {"content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": not special,
            "special": special, **fields}


def added_tokens(rstrip=False, lstrip=False):
    marks = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<｜end▁of▁turn｜>"]
    tokens = [token(mark, rstrip=rstrip, lstrip=lstrip) for mark in marks]
    tokens += [token("<think>", False, normalized=False), token("</think>", False), token("\n\n", False, normalized=False)]
    return tokens + [token("kebab-case", False, single_word=True), token("Ａ Ｂ é", False)]


# What the models are learnt from.
OWN = [text for text in TEXTS if len(text) < 250] * 3 + [
    "The keeper of the lighthouse wrote: \"I don't know what they've seen, we'll see in 1999 or 2024.\"\n\n",
    "def add(a, b):\n    return a + b  # 1 + 1 = 2\n\n\nclass Thing:\n\tx = 100000\n", "DON'T PANIC, it's 12:30. HTTPServer v2.0.1\r\n",
    "그는 어제 서울에서 친구를 만났다. 東京の天気は晴れです。我们明天去北京。", "Ёжик в тумане; naïve café, Straße. e\u0301a\u0300",
] * 20


def learnt(kind):
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        trainer = trainers.BpeTrainer(
            vocab_size=700, max_token_length=8, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        tokenizer.train_from_iterator(OWN, trainer)
        return json.loads(tokenizer.to_str())["model"]
    # Characters that are rare fall back to bytes.
    own = ["".join(c if c < "\u0250" or "가" <= c < "나" else "。" for c in text).replace(" ", "▁") for text in OWN]
    if kind == "pieces":
        trainer = trainers.BpeTrainer(vocab_size=450, max_token_length=8, show_progress=False)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.train_from_iterator(own, trainer)
        model = json.loads(tokenizer.to_str())["model"]
        base = ["<unk>"] + [f"<0x{byte:02X}>" for byte in range(256)]
        vocab = {piece: id for id, piece in enumerate(base + sorted(model["vocab"], key=model["vocab"].get))}
        return {**model, "vocab": vocab, "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.train_from_iterator(own, trainers.UnigramTrainer(
        vocab_size=400, show_progress=False, unk_token="<unk>", max_piece_length=8, special_tokens=["<unk>"]))
    model = json.loads(tokenizer.to_str())["model"]
    bytes = [[f"<0x{byte:02X}>", -20.0] for byte in range(256)]
    return {**model, "vocab": [[piece, round(score, 3)] for piece, score in model["vocab"]] + bytes, "byte_fallback": True}


def post_processor(ids):
    return {"type": "TemplateProcessing", "special_tokens": {"<s>": {"id": "<s>", "ids": [ids], "tokens": ["<s>"]}},
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}]}


def definition(kind, model):
    """`tokenizer.json` without its model, and what is changed in that."""
    size = len(model["vocab"])
    tokens = added_tokens(kind.get("rstrip", False), kind.get("lstrip", False))
    return {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": size + place, **token} for place, token in enumerate(tokens)],
            **{part: kind[part] for part in ["normalizer", "pre_tokenizer", "decoder"]},
            "post_processor": post_processor(size)}


# Unlike transformers, a byte that is no character does not spoil those beside it: as in mlx-lm.
def spoils(name, text):
    return name == "unigram_bytes" and "<0xFF>" in text


def case(tokenizer, text):
    ids = tokenizer.encode(text)
    plain = tokenizer.encode(text, add_special_tokens=False)
    assert ids == ids[:1] + plain
    decoded = tokenizer.decode(plain, clean_up_tokenization_spaces=False)
    visible = tokenizer.decode(plain, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [ids, None if decoded == text else decoded, None if visible == decoded else visible]


def main():
    texts = [text for text in TEXTS if len(text) < 250] + [
        "<|im_start|>user\n\nStraße <｜end▁of▁turn｜> x<think>\n\na</think>kebab-case kebab-cases Ａ Ｂ é</s>",
        " <s> a <s>b</s> \n\n\n </s>", "12345678 x1234", "I'll DON'T 'sa '", "가나다 가 나", "a  \n\n  b\n\r\n",
    ]
    learnt_models = {kind: learnt(kind) for kind in ["bytes", "pieces", "unigram"]}
    tokenizers = {}
    for name, kind in KINDS.items():
        model = learnt_models[kind["model"]]
        changes = {"ignore_merges": True} if kind.get("ignore_merges") else {}
        if name in ["unigram", "unigram_first"]:
            changes = {"byte_fallback": False}
        parts = definition(kind, model)
        tokenizer = Tokenizer.from_str(json.dumps({**parts, "model": {**model, **changes}}))
        tokenizer = TokenizersBackend(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
        cases = [None if spoils(name, text) else case(tokenizer, text) for text in texts]
        tokenizers[name] = {"model": kind["model"], "changes": changes, "definition": parts, "cases": cases}
    compact = lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    lines = [f'"{name}":{compact(value)}' for name, value in tokenizers.items()]
    TARGET.write_text('{"texts":' + json.dumps(texts) + ',\n"models":' + compact(learnt_models) + ',\n"tokenizers":{\n'
                      + ",\n".join(lines) + "\n}}\n")
    print(len(tokenizers), "tokenizers,", len(texts), "texts")


if __name__ == "__main__":
    main()
