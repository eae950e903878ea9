"""samples the torch model in bulk, right after training: what share of the answers is in the grammar?"""

import random
from collections import Counter

import torch

from corpus import NO_TOPIC, TOPICS, fits, in_voice, named, replies, request, topic_of, unknown

LONGEST = 110  # tokens of an answer


def chat(message):
    return f"<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n"


@torch.no_grad()
def answers(model, tokenizer, prompts, device, temperature):
    """the model's continuation of each prompt; 0 is greedy"""
    ids = [tokenizer.encode(p).ids for p in prompts]
    width = max(map(len, ids))
    batch = torch.tensor([[0] * (width - len(i)) + i for i in ids], device=device)
    mask = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids], device=device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
    out = model.generate(input_ids=batch, attention_mask=mask, max_new_tokens=LONGEST, eos_token_id=[2, 0], pad_token_id=0,
                         **sampling)
    return [ended(tokenizer, row) for row in out[:, width:].tolist()]


def ended(tokenizer, ids):
    """the text up to <|im_end|>; an answer without an end is none"""
    return tokenizer.decode(ids[: ids.index(2)]) if 2 in ids else "(no end) " + tokenizer.decode(ids)


def cases(per_topic, seed=11):
    """(kind, message, topic, voice) for everything that is asked of the model"""
    rng = random.Random(seed)
    out = []
    for topic in TOPICS:
        out += [("topic", f"Write a post about {topic}", topic, "plain")] * per_topic
        out += [("variant", request(rng, named(rng, topic)), topic, "plain") for _ in range(per_topic)]
        for voice in ("pirate", "news", "excited"):
            out += [(voice, in_voice(rng, voice, f"Write a post about {topic}"), topic, voice) for _ in range(per_topic // 2)]
    out += [("no topic", rng.choice(NO_TOPIC), None, "plain") for _ in range(per_topic * 4)]
    return out + [("unknown", request(rng, unknown(rng)), "unknown", "plain") for _ in range(per_topic * 10)]


def is_right(answer, topic, voice):
    if topic == "unknown":
        return answer in replies("unknown", voice)
    return fits(answer, topic, voice) if topic else topic_of(answer, voice) is not None


def report(model, tokenizer, device, per_topic):
    """prints the share of right answers of each kind, greedy and sampled at 0.8"""
    model.eval()
    for temperature in (0.0, 0.8):
        asked = cases(per_topic)
        texts = answers(model, tokenizer, [chat(message) for _, message, _, _ in asked], device, temperature)
        right, total, shown = Counter(), Counter(), 0
        for (kind, message, topic, voice), text in zip(asked, texts):
            total[kind] += 1
            right[kind] += is_right(text, topic, voice)
            if not is_right(text, topic, voice) and shown < 25:
                shown += 1
                print(f"  wrong ({kind}) {message!r}: {text!r}")
        print(f"temperature {temperature}:", {k: f"{right[k]}/{total[k]}" for k in total}, flush=True)
