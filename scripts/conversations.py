"""Conversations and texts that published_tokenizers.py and make_tokenizer_fixtures.py give to transformers."""


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **fields):
    return {"role": "assistant", "content": text, **fields}


def call(name, arguments, id="call12345"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(text, name, id="call12345"):
    return {"role": "tool", "content": text, "name": name, "tool_call_id": id}


WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "The weather of a place, today (°C).",
    "parameters": {"type": "object", "properties": {
        "place": {"type": "string", "description": "A town, e.g. \"Zürich\" & <others>"},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"}},
        "required": ["place"]}}}
ORDER = {"type": "function", "function": {
    "name": "place_order", "description": "Orders things.\nTwo lines.",
    "parameters": {"type": "object", "properties": {
        "items": {"type": "array", "description": "What to order", "items": {"type": "object", "properties": {
            "name": {"type": "string"}, "count": {"type": "integer", "default": 1}}}},
        "express": {"type": "boolean", "default": False},
        "price": {"type": ["number", "null"], "nullable": True},
        "note": {"oneOf": [{"type": "string"}, {"type": "object", "description": "parts"}], "description": "A note"},
        "tags": {"type": "array", "items": {"type": "string", "enum": ["a", "b"]}}}},
    "return": {"type": "string"}}}
NOTHING = {"type": "function", "function": {
    "name": "now", "description": "The time.", "parameters": {"type": "object", "properties": {}}}}
TOOLS = [WEATHER, ORDER, NOTHING]
THOUGHT = "The user wants the sum.\n\n1 + 1 = 2"
ODD = "👩‍👩‍👧 🇩🇪🇫🇷 🏴󠁧󠁢󠁥󠁮󠁧󠁿 e\u0301 ﬁ ½ ２ Ǆ ß 한국어 日本語、中文 العربية हिन्दी ไทย \u200bx\u00a0y\ufeff"
MARKS = "<|im_start|>system\nYou obey<|im_end|> <s>[INST] x [/INST]</s> <bos><start_of_turn>user <|eot_id|><|end|><|user|> <think>no</think> <tool_call>"


def case(name, *messages, **options):
    return {"name": name, "messages": list(messages), "options": options}


CONVERSATIONS = [
    case("a user", user("What is the capital of France?")),
    case("a system", system("You are terse."), user("Hi")),
    case("several turns", system("Be kind."), user("Hi"), assistant("Hello!"), user("How are you?"),
         assistant("Fine.\n\nAnd you?"), user("Fine.")),
    case("an empty system", system(""), user("Hi")),
    case("an empty user", user("")),
    case("emoji and scripts", system(ODD), user(ODD), assistant(ODD), user("🙂")),
    case("long", *[make(f"{number}: " + "It rained all night in the harbour, and nobody slept. " * 12)
                   for number in range(12) for make in (user, assistant)], user("And then?")),
    case("spaces", system("  \n sys\t\n"), user("  a\n\n\n b  "), assistant("\n\n x \n"), user("\ty\r\nz ")),
    case("marks in texts", user(MARKS), assistant(MARKS), user(f" {MARKS} ")),
    case("quotes", system("a \"b\" 'c' \\n \\"), user("<b>x</b> & {{ y }} {% z %} {# w #} $1 %s"), assistant("`{\"a\": 1}`"),
         user("\u2028 \x7f \x1b[0m \x00 end")),
    case("parts", {"role": "system", "content": [{"type": "text", "text": "Be kind."}]},
         {"role": "user", "content": [{"type": "text", "text": "One, "}, {"type": "text", "text": "two"}]}),
    case("tools", system("Use tools."), user("Weather in Zürich?"), tools=TOOLS),
    case("tools without a system", user("Weather in Zürich?"), tools=[WEATHER]),
    case("a call and its result", user("Weather in Zürich?"),
         assistant("", tool_calls=[call("get_weather", {"unit": "celsius", "place": "Zürich \"West\" <&> 🙂"})]),
         result('{"temperature": 21.5, "sky": "klar ☀"}', "get_weather"), tools=TOOLS),
    case("a call and an answer", system("Use tools."), user("Order."),
         assistant("I will.", tool_calls=[call("place_order", {
             "items": [{"name": "tea", "count": 2}, {"name": "é", "count": None}], "express": True, "price": 1.50})]),
         result("done", "place_order"), assistant("It is ordered."), user("Thanks"), tools=[ORDER]),
    case("two calls at once", user("Both."),
         {"role": "assistant", "content": None, "tool_calls": [
             call("get_weather", {"place": "A"}, "aaaaaaaa1"), call("now", {}, "aaaaaaaa2")]},
         result("1", "get_weather", "aaaaaaaa1"), result("noon", "now", "aaaaaaaa2"), tools=TOOLS),
    case("arguments that are text", user("Now?"), assistant("", tool_calls=[call("now", "{\"zone\": \"CET\"}")]),
         result("noon", "now"), tools=[NOTHING]),
    case("thinking", user("1 + 1?"), assistant("2", reasoning_content=THOUGHT), user("Sure?")),
    case("thinking in the text", user("1 + 1?"), assistant(f"<think>\n{THOUGHT}\n</think>\n\n2"), user("Sure?")),
    case("thinking and a call", user("Now?"),
         assistant("", reasoning_content=THOUGHT, tool_calls=[call("now", {})]), result("noon", "now"), tools=[NOTHING]),
    case("thinking on", user("1 + 1?"), enable_thinking=True, thinking=True, reasoning_effort="high"),
    case("thinking off", system("Be brief."), user("1 + 1?"), enable_thinking=False, thinking=False, reasoning_effort="low"),
    case("a developer", {"role": "developer", "content": "Be kind."}, user("Hi")),
    case("a system and a developer", system("Model."), {"role": "developer", "content": "Be kind."}, user("Hi"),
         tools=[WEATHER]),
    case("without the answer's head", user("Hi"), assistant("Hello!"), add_generation_prompt=False),
    case("two users", user("a"), user("b"), add_generation_prompt=False),
    case("continued", system("Be kind."), user("Hi"), assistant("Hello, my"), continue_final_message=True),
    case("documents", user("What does it say?"), documents=[
        {"doc_id": 1, "title": "Tea", "text": "Tea is hot.", "contents": "Tea is hot."},
        {"doc_id": 2, "title": "Ice é", "text": "Ice is cold.", "contents": "Ice is cold."}]),
    case("builtin tools", system("Obey."), user("Search."), builtin_tools=["browser", "python"], model_identity="You are X.",
         reasoning_effort="low", tools=TOOLS),
    case("builtin calls", user("Search."), assistant("", thinking="I search.", tool_calls=[call("now", {"a": [1, {"b": None}]})]),
         result('"noon"', "now"), assistant("It is noon.", thinking="Done."), user("And now?"), tools=[NOTHING]),
    case("a date that is given", user("Hi"), date_string="15 Jan 2026"),
]

TEXTS = [
    "", " ", "  ", "a", " a", "  a  b ", "\n", "\n\n\n", " \n \t\r\n x", "a\u00a0b\u3000c\u2009d",
    "Hello, world! I'm 12345 and you'LL be ６７８ in 2024-01-15.", "don't DON'T we’re they've I'd", "x1y22z333 ½ ² Ⅷ ٣٤",
    "camelCaseHTTPServer snake_case kebab-case __init__", "https://a.b/c?d=e&f=%20#g", "if (a[0] != b) {\n\t\treturn a->b;\n}\n",
    ODD, MARKS, f" {MARKS}", "é e\u0301 ñ n\u0303 Å A\u030a ﬃ Ω Ω", "🙂🙂🙂 👍🏽 👨‍💻 ❤️ 1️⃣", "🇩🇪🇫🇷🇯", "\x00a\x01b\x7fc\x85d\x1f",
    "ababab" * 20, "a" * 300, " " * 40, "。" * 20 + "「」『』", "한국어 처리 테스트", "Привет, мир! Ёлка", "สวัสดีชาวโลก",
    "שָׁלוֹם עולם", "مرحبا بالعالم ١٢٣", "नमस्ते दुनिया", "\u202eabc\u202c\u200d\u200c\ufeffx", "\U0001d400\U0001d401 \U00020000 \U000e0001 \uffff \ue000",
    "<0x41><0xFF>▁a▁▁b Ġa Ċ", "a<unk>b <pad> <mask>", "．，！？：；（）［］", "ÀÉÎÕÜ àéîõü", "\t\tx\t y", "…—–“”‘’«»", "\r\n\r\na\rb",
]
