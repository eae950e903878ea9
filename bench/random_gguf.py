"""Qwen3-0.6B's shape with random weights for llama.cpp, as `bench` makes it for Bombus.

    pip install gguf numpy
    python bench/random_gguf.py OUT.gguf [Q4_0]
"""

import sys

import gguf
import numpy as np

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCAB = 1024, 28, 16, 8, 128, 3072, 151936


def byte_tokens():
    """GPT-2's characters for the 256 bytes, in the order of the bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) if byte in plain else chr(256 + others.index(byte)) for byte in range(256)]


def write_header(writer, kind):
    writer.add_context_length(40960)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCAB)
    writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{kind}"))
    tokens = byte_tokens()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens + [f"<{index}>" for index in range(VOCAB - 256)])
    writer.add_token_types([1] * VOCAB)
    writer.add_token_merges([f"{tokens[72]} {tokens[105]}"])
    writer.add_eos_token_id(VOCAB - 1)
    writer.add_add_bos_token(False)


def shapes():
    """Name -> shape, of one dimension where it is a norm."""
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    yield "token_embd", (VOCAB, HIDDEN)
    yield "output_norm", (HIDDEN,)
    for layer in range(LAYERS):
        for name, shape in {
            "attn_norm": (HIDDEN,), "attn_q": (q, HIDDEN), "attn_k": (kv, HIDDEN), "attn_v": (kv, HIDDEN),
            "attn_output": (HIDDEN, q), "attn_q_norm": (HEAD_DIM,), "attn_k_norm": (HEAD_DIM,),
            "ffn_norm": (HIDDEN,), "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN),
            "ffn_down": (HIDDEN, INNER),
        }.items():  # fmt: skip
            yield f"blk.{layer}.{name}", shape


def main():
    out, kind = sys.argv[1], (sys.argv[2:] or ["Q4_0"])[0]
    dtype = getattr(gguf.GGMLQuantizationType, kind)
    writer = gguf.GGUFWriter(out, "qwen3")
    write_header(writer, kind)
    rng = np.random.default_rng(0)
    for name, shape in shapes():
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
        else:
            weight = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weight, dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
