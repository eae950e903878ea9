"""What mlx-lm and transformers answer about a checkpoint, on the CPU: a request of JSON in, an answer of JSON out.

    python test/support/reference.py FOLDER '{"score": [TEXT, ...], "texts": [TEXT, ...], "chats": [MESSAGES, ...]}'

    scored      of each text to score: token_ids, and logprobs, ln p(token i | tokens before)
    token_ids   of each of texts, without special tokens of its own
    decoded     those ids as text again
    prompts     of each chat, with the head of the answer
"""

import json
import sys

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import load

mx.set_default_device(mx.cpu)


def score(model, ids):
    logprobs = nn.log_softmax(model(mx.array([ids[:-1]]))[0].astype(mx.float32))
    return mx.take_along_axis(logprobs, mx.array(ids[1:])[:, None], axis=-1)[:, 0].tolist()


def answer(folder, request):
    model, tokenizer = load(folder)
    ids = [tokenizer.encode(text) for text in request["texts"]]
    scored = [tokenizer.encode(text) for text in request["score"]]
    chat = lambda messages: tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return {
        "scored": [{"token_ids": each, "logprobs": score(model, each)} for each in scored],
        "token_ids": ids,
        "decoded": [tokenizer.decode(each) for each in ids],
        "prompts": [chat(messages) for messages in request["chats"]],
    }


if __name__ == "__main__":
    json.dump(answer(sys.argv[1], json.loads(sys.argv[2])), sys.stdout)
