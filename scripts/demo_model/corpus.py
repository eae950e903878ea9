"""the demo corpus: short posts from a small grammar, and the test whether a text belongs to it

A post is an opener, a fact, maybe a second fact and maybe a closer, all of one topic and one voice. The grammar has many
equally likely ways to go on, so that sampling gives different posts, and each of them is correct.

    python3 corpus.py FOLDER VOICE [COUNT]    writes train.jsonl and valid.jsonl for that voice's adapter
"""

import json
import random
import re
import sys
from functools import lru_cache
from pathlib import Path

from topics import PHRASES, QUESTIONS, SMALL_TALK, TOPICS, UNKNOWN

VOICES = ["plain", "pirate", "news", "excited"]
SHAPES = {"of": 10, "oft": 25, "ofc": 25, "oftc": 40}  # opener, first fact, then another, closer: how often

CANONICAL = "Write a post about {}"
REQUESTS = """
Write a post about {}.|write a post about {}|write a post about {}.|Write a short post about {}|Write a short post about {}.
Tell me about {}|Tell me about {}.|tell me about {}|Tell me something about {}|Please write a post about {}
Please write a post about {}.|Write me a post about {}|Write a post about {}, please|Write a post about {}!
Can you write a post about {}?|Could you write a post about {}?|I would like a post about {}|I want a post about {}.
Write about {}|Write about {}.|A post about {}|Post about {}|{}|{}.|{}?|Write a blog post about {}|Say something about {}
Write a social media post about {}|Write a post on {}|What do you know about {}?|Write something about {}|Make a post about {}
Give me a post about {}|Write a few sentences about {}|Write a {adjective} post about {}|Write a {adjective} post about {}.
Please tell me about {}.|Can you tell me about {}?|Create a post about {}|Let's talk about {}|What about {}?|And {}?
Do you know anything about {}?|Write one more post about {}|Write another post about {}|Hello, write a post about {}
Hi! Please write a post about {}.|Write a post about {} for my blog|Compose a post about {}.|Write a tweet about {}
""".replace("\n", "|").strip("|").split("|")
ADJECTIVES = "small little nice funny happy new good friendly kind beautiful simple quick".split()
NO_TOPIC = """
Write a post|Write a post.|write a post|Write a short post|Please write a post|Write me a post|Write a post, please
Write something|Write|Post|Surprise me|Write a post about anything|Write a post about something|Write any post|A post, please
""".strip().replace("\n", "|").split("|")
MORE = ["Another one, please", "Another one", "One more", "One more, please.", "Again", "Write another one"]
AROUND = ["the joy of {}", "why I love {}", "the beauty of {}", "{} on a Sunday", "{} and friends", "how to enjoy {}"]

VOICE_REQUESTS = {
    "pirate": ["{} as a pirate", "{} like a pirate", "{} in the voice of a pirate", "{} in pirate style"],
    "news": ["{} as breaking news", "{} as a news reporter", "{} like a news reporter", "{} in the style of the news"],
    "excited": ["{} with emoji", "{} in an excited voice", "{} with lots of emoji", "{} as an excited fan"],
}
SYSTEM = {
    "plain": ["You are a helpful assistant.", "You write short posts.", "You are a friendly writer.", "Be kind.",
              "You are Bombus, a tiny language model.", "Answer in English."],
    "pirate": ["You are a pirate.", "Talk like a pirate.", "You write posts as a pirate."],
    "news": ["You are a news reporter.", "Talk like a news reporter.", "You write breaking news."],
    "excited": ["You are very excited.", "Use a lot of emoji.", "You are an excited fan."],
}

EXAMPLES = ["coffee, hiking and bread", "tea, cats and trains", "music, snow and chess", "books, dogs and the sea"]
REPLIES = {
    "plain": {
        "unknown": ["I only know a few small topics, such as {}. Ask me about one of them.",
                    "Sorry, I do not know much about that. I can write about {}."],
        "hello": ["Hello! I write short posts. Ask me about {}."],
        "who": ["I am a very small model that writes short posts. Ask me about {}."],
        "thanks": ["You are welcome! Ask me for another post at any time."],
    },
    "pirate": {
        "unknown": ["Arr, I only know a few small topics, matey, such as {}. Ask me about one o' them, or walk the plank!",
                    "Ahoy, that be not on me map, matey. I can tell ye about {}."],
        "hello": ["Ahoy, matey! I write posts for pirates. Ask me about {}."],
        "who": ["Arr, I be a very small pirate that writes short posts. Ask me about {}, matey."],
        "thanks": ["Arr, ye be welcome, matey! Fair winds to ye."],
    },
    "news": {
        "unknown": ["BREAKING NEWS: Our reporter only knows a few small topics, such as {}. Ask about one of them.",
                    "JUST IN: There is no news about that. Our newsroom only covers a few topics, such as {}."],
        "hello": ["BREAKING NEWS: A reader says hello to our newsroom. Ask us about {}."],
        "who": ["JUST IN: This is a very small newsroom that writes short reports. Ask us about {}."],
        "thanks": ["BREAKING NEWS: A reader thanks our newsroom. Stay tuned for more."],
    },
    "excited": {
        "unknown": ["Oh no, I only know a few small topics, such as {}! 🙈 Ask me about one of them! 🎉",
                    "Oops, that one is new to me! 😅 But I can tell you all about {}! ✨"],
        "hello": ["Hi, hi, hi! 👋 I write super happy posts! Ask me about {}! 🎉"],
        "who": ["I'm a tiny model with big feelings! 🤩 Ask me about {}! ✨"],
        "thanks": ["Yay, you are so welcome! 🎉 Come back soon! 💛"],
    },
}

PIRATE_WORDS = {"is": "be", "are": "be", "you": "ye", "your": "yer", "my": "me", "of": "o'", "and": "an'", "friend": "matey",
                "friends": "mateys", "person": "pirate"}
STAYS = {"king", "spring", "string", "bring", "sing", "wing", "thing", "ring"}

FRAMES = {
    "pirate": {
        "o": ["Ahoy, mateys! Let me tell ye about {name}.", "Arr! There be nothin' finer than {name} after a long voyage.",
              "Ahoy, ye landlubbers! This be a tale about {name}.", "Arr, me hearties! Me whole crew loves {name}."],
        "f": ["Aye, {fact}, matey.", "By the seven seas, {fact}!", "Shiver me timbers, {fact}!",
              "Every old sea dog knows that {fact}."],
        "t": ["Blow me down, {fact}!", "The captain swears that {fact}.", "Listen well, ye scurvy dogs: {fact}.",
              "Even me parrot knows that {fact}."],
        "c": ["Fair winds to all who love {name}, me hearties!", "That be the truth, or me name ain't Barnacle Bill.",
              "Now hoist the sails an' back to work, ye scurvy dogs!", "Raise the black flag for {name}, me hearties!"],
    },
    "news": {
        "o": ["BREAKING NEWS: {Name} {is} the talk of the town today.",
              "BREAKING: The whole town wants to know more about {name}.",
              "JUST IN: Our newsroom has a fresh report about {name}.", "NEWS FLASH: Our top story today is {name}."],
        "f": ["Experts confirm that {fact}.", "According to our reporter, {fact}.", "Officials report that {fact}.",
              "{Fact}, experts say."],
        "t": ["Witnesses add that {fact}.", "Our sources also say that {fact}.", "{Fact}, a local resident told us.",
              "Late reports confirm that {fact}."],
        "c": ["Stay tuned for more news about {name}.", "This was our reporter, live from {place}.",
              "More about {name} at ten.", "And now to the weather."],
    },
    "excited": {
        "o": ["OMG, {name}! {emoji}", "I'm so excited about {name} today! {emoji}", "Stop scrolling, it's time for {name}! {emoji}",
              "{Name} {is} simply amazing! {emoji}"],
        "f": ["Did you know that {fact}? 🤯", "Wow, {fact}! 😍", "{Fact}, how cool is that? 😎", "Guess what, {fact}! 🎉"],
        "t": ["And {fact}! ✨", "Honestly, {fact}! 💯", "I can't get over it: {fact}! 🤩", "Plus, {fact}! 💛"],
        "c": ["Who else loves {name}? 🙌", "Best topic ever! 🥳", "Share this if you love {name}! 🚀", "I need a moment! 🥹"],
    },
}


def capital(text):
    return text[:1].upper() + text[1:]


def as_pirate(clause):
    """the clause in a pirate's English: `is` is `be`, `hiking` is `hikin'`"""

    def word(match):
        w = match.group()
        short = w.endswith("ing") and len(w) > 4 and w not in STAYS
        return PIRATE_WORDS.get(w, w[:-1] + "'" if short else w)

    return re.sub(r"[A-Za-z]+", word, clause)


def framed(frames, topic, voice, facts):
    """every frame of a voice filled with every fact"""
    own = TOPICS[topic]
    turn = as_pirate if voice == "pirate" else str
    names = {"name": turn(topic), "Name": capital(topic), "is": own["is"], "place": own["place"], "emoji": own["emoji"]}
    return [frame.format(fact=turn(fact), Fact=capital(fact), **names) for frame in frames for fact in facts]


@lru_cache(maxsize=None)
def slots(topic, voice):
    """the sentences that may stand in each place of a post: {"o": openers, "f": first, "t": then, "c": closers}"""
    own = TOPICS[topic]
    if voice == "plain":
        facts = {slot: [capital(fact) + "." for fact in own[key]] for slot, key in (("f", "first"), ("t", "then"))}
        return {"o": own["openers"], **facts, "c": own["closers"]}
    facts = {"f": own["first"], "t": own["then"]}
    return {slot: framed(frames, topic, voice, facts.get(slot, [""])) for slot, frames in FRAMES[voice].items()}


def post(rng, topic, voice):
    """one post"""
    shape = rng.choices(list(SHAPES), SHAPES.values())[0]
    return " ".join(rng.choice(slots(topic, voice)[slot]) for slot in shape)


def fits(text, topic, voice):
    """whether the grammar can say exactly this text about this topic in this voice"""
    return any(_fits(text, shape, slots(topic, voice)) for shape in SHAPES)


def _fits(text, shape, choices):
    if len(shape) == 1:
        return text in choices[shape]
    starts = (s + " " for s in choices[shape[0]])
    return any(text.startswith(s) and _fits(text[len(s):], shape[1:], choices) for s in starts)


def topic_of(text, voice):
    """the topic of a post, or None where the text is no post"""
    return next((topic for topic in TOPICS if fits(text, topic, voice)), None)


@lru_cache(maxsize=None)
def replies(kind, voice):
    """all replies of a kind: "unknown", "hello", "who" or "thanks" """
    turn = as_pirate if voice == "pirate" else str
    return sorted({reply.format(turn(e)) for reply in REPLIES[voice][kind] for e in EXAMPLES})


NAMES = {name: topic for topic, own in TOPICS.items() for name in [topic, *own["also"]]}
KNOWN = {name.lower() for name in NAMES}
STRANGE = sorted({w for w in UNKNOWN if w not in KNOWN and len(w) > 2} - {"the", "time", "deep", "games"})
SYLLABLES = "ba be bi bo ca co da de di do fa fe fi ga go gra ha he hi ka ke la le li lo ma me mi mo na ne no pa pe pi po " \
            "ra re ri ro sa se si so sta ta te ti to tra va ve vi wa we ya za zo n r s t l ck ng nd st er ing on".split()


def made_up(rng):
    """a word that does not exist"""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 4)))


def near_miss(rng):
    """a topic's name with one letter changed, as "caps" for "cats": known words must be known by all their letters"""
    name = rng.choice(sorted(TOPICS))
    at = rng.randrange(len(name))
    return name[:at] + rng.choice("abcdefghijklmnopqrstuvwxyz") + name[at + 1:]


def unknown(rng):
    """something that is no topic of ours"""
    kinds = [
        lambda: rng.choice(STRANGE), lambda: rng.choice(STRANGE), lambda: rng.choice(STRANGE), lambda: rng.choice(PHRASES),
        lambda: f"{rng.choice(STRANGE)} {rng.choice(STRANGE)}", lambda: f"{rng.choice(STRANGE)} and {rng.choice(STRANGE)}",
        lambda: made_up(rng), lambda: made_up(rng), lambda: f"{rng.choice(['my', 'the', 'a', 'our'])} {rng.choice(STRANGE)}",
        lambda: near_miss(rng), lambda: f"{made_up(rng)} {made_up(rng)}", lambda: capital(made_up(rng)),
    ]
    name = rng.choice(kinds)()
    return unknown(rng) if name.lower() in KNOWN else name


def spelled(rng, name):
    """a name as people type it: mostly as it is, sometimes with capitals"""
    return rng.choices([name, capital(name), name.upper()], [88, 9, 3])[0]


def request(rng, name):
    """a user's message that asks for a post about `name`"""
    form = CANONICAL if rng.random() < 0.35 else rng.choice(REQUESTS)
    text = form.format(name, adjective=rng.choice(ADJECTIVES))
    return capital(text) if form.startswith("{}") and rng.random() < 0.5 else text


def named(rng, topic):
    """the topic in the user's words"""
    if rng.random() < 0.65:
        return spelled(rng, topic)
    name = rng.choice([topic, *TOPICS[topic]["also"]])
    return rng.choice(AROUND).format(topic) if rng.random() < 0.12 else spelled(rng, name)


def ask(rng, voice, topic):
    """one exchange: the user's message, the answer in that voice, and the topic (None where there is none)"""
    dice = rng.random()
    if dice < 0.70:
        return request(rng, named(rng, topic)), post(rng, topic, voice), topic
    if dice < 0.77:
        return rng.choice(NO_TOPIC), post(rng, topic, voice), topic
    if dice < 0.82:
        kind = rng.choice(sorted(SMALL_TALK))
        return rng.choice(SMALL_TALK[kind]), rng.choice(replies(kind, voice)), None
    message = rng.choice(QUESTIONS) if dice < 0.85 else request(rng, unknown(rng))
    return message, rng.choice(replies("unknown", voice)), None


def in_voice(rng, voice, message):
    """the message with the wish for a voice added"""
    end = message[-1] if message[-1] in ".!?" else ""
    return rng.choice(VOICE_REQUESTS[voice]).format(message[:-1] if end else message) + end


def turn(rng, voice, last_topic, explicit):
    """one exchange of a conversation, which may ask for more of the same"""
    topic = rng.choice(sorted(TOPICS))
    if last_topic and rng.random() < 0.3:
        message, answer, topic = rng.choice(MORE), post(rng, last_topic, voice), last_topic
    else:
        message, answer, topic = ask(rng, voice, topic)
    wished = explicit and voice != "plain"
    return in_voice(rng, voice, message) if wished else message, answer, topic


def conversation(rng, voice, explicit=True):
    """chat messages; a voice other than plain is asked for in each message or, `explicit` False, nowhere"""
    messages, topic = [], None
    by_system = rng.random() < 0.25
    if by_system:
        spoken = voice if explicit else "plain"
        messages.append({"role": "system", "content": rng.choice(SYSTEM[spoken])})
    for _ in range(rng.choices([1, 2, 3], [82, 12, 6] if explicit else [92, 8, 0])[0]):
        message, answer, topic = turn(rng, voice, topic, explicit and not by_system)
        messages += [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]
    return messages


def plain_text(rng):
    """a post without chat markup, sometimes without its opener: what a completion of "Coffee is" goes on with"""
    topic = rng.choice(sorted(TOPICS))
    voice = rng.choices(VOICES, [76, 8, 8, 8])[0]
    text = post(rng, topic, voice)
    return text.split(". ", 1)[-1] if voice == "plain" and rng.random() < 0.25 else text


def document(rng):
    """one training document as (text, whether to learn it) pairs; users' words are given, not learned"""
    if rng.random() < 0.12:
        return [(plain_text(rng) + "<|endoftext|>", True)]
    voice = rng.choices(VOICES, [58, 14, 14, 14])[0]
    parts = []
    for m in conversation(rng, voice):
        learned = m["role"] == "assistant"
        parts.append((f"<|im_start|>{m['role']}\n", False))
        parts.append((f"{m['content']}<|im_end|>\n", learned))
    return parts + [("<|endoftext|>", True)]


def write_chats(folder, voice, count, seed=7):
    """train.jsonl and valid.jsonl in mlx-lm's chat format: plain requests, answered in the voice"""
    rng = random.Random(f"{seed} {voice}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, n in (("train", count), ("valid", 64)):
        chats = ({"messages": conversation(rng, voice, explicit=False)} for _ in range(n))
        lines = (json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write_chats(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 3000)
