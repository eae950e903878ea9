defmodule Bombus.RealModelTest do
  # SmolLM2-135M-Instruct, which scripts/real_model.sh fetches: real weights, 30 layers of a Llama,
  # show what small random ones hide.
  use ExUnit.Case, async: true

  alias Bombus.{Fixtures, Serving, Tokenizer}

  @folder Path.expand("../../.toolchain/models/smollm2", __DIR__)
  @python System.get_env("BOMBUS_PYTHON")
  @moduletag timeout: 300_000
  @moduletag skip:
               (!File.dir?(@folder) && "scripts/real_model.sh has not fetched the model (93 MB)") ||
                 (!@python && "BOMBUS_PYTHON names no Python with mlx_lm")

  @text """
  The lighthouse stands on a low rock, two miles from the harbour. In 1882 the keepers lit its lamp \
  for the first time, and for ninety-seven years somebody climbed the 112 steps every evening. When \
  the fog came in from the sea, a bell was rung twice a minute until the morning. Today the light \
  is electric, and nobody lives there but the gulls.\
  """

  @texts [
    @text,
    "In 1969, 2 men walked 12345 m (½ of 24690²).",
    "  two spaces,\ttab\r\n\n\ndef f(x1):\n    return x1 + 10  ",
    "don't you'll I'VE we’re",
    "Grüße aus 東京 🙂👩‍👩‍👧 Ελλάδα ٣٤ Ⅷ e\u0301",
    "<|im_start|>user\nhi<|im_end|>\n<repo_name>a<|endoftext|>",
    # Bytes that the vocabulary has no token for.
    "a\x04b\x16c\u{40000}d"
  ]

  @user %{role: "user", content: "What is the capital of France?"}
  @chats [
    [@user],
    [%{role: "system", content: "Answer in one word."}, @user],
    [@user, %{role: "assistant", content: "Paris."}, %{role: "user", content: "And of Italy?"}]
  ]

  setup_all do
    %{tokenizer: Bombus.load_tokenizer!(@folder), reference: reference()}
  end

  # What mlx-lm and transformers answer.
  defp reference do
    script = Path.expand("../support/reference.py", __DIR__)
    request = JSON.encode!(%{score: [@text], texts: @texts, chats: @chats})
    {answer, 0} = System.cmd(@python, [script, @folder, request])
    JSON.decode!(answer)
  end

  for device <- Fixtures.devices() do
    describe inspect(device) do
      setup %{tokenizer: tokenizer} do
        model = Bombus.load_model!(@folder, device: unquote(Macro.escape(device)))
        %{model: model, serving: Serving.new(model, tokenizer, max_new_tokens: 200)}
      end

      test "the capital of France", %{serving: serving} do
        %{results: [result]} = Serving.run(serving, @user.content)
        assert result.text =~ "Paris"
        assert result.finish_reason == :stop
      end

      test "a story of 200 tokens ends in words", %{serving: serving, tokenizer: tokenizer} do
        prompt = "Write a long story about a lighthouse keeper and a lost ship."
        pieces = serving |> Serving.stream(prompt) |> Enum.to_list()
        assert length(pieces) > 100
        assert Enum.all?(pieces, &String.valid?/1)
        story = Enum.join(pieces)
        assert Tokenizer.count!(tokenizer, story) in 190..210
        assert_story(story)
      end

      test "an English text scores as in mlx-lm", %{model: model, reference: reference} do
        [%{"token_ids" => ids, "logprobs" => expected}] = reference["scored"]
        {:ok, scored} = Bombus.score(model, ids)
        worst = scored |> Enum.zip_with(expected, &abs(&1 - &2)) |> Enum.max()
        assert worst <= 1.0e-3
        assert length(scored) == length(expected)
        # Weights in the wrong order would know no English.
        assert Enum.sum(scored) / length(scored) > -4
      end
    end
  end

  # Many words, of them many common ones, and no sentence again and again.
  defp assert_story(story) do
    words = ~r/[a-z]+/ |> Regex.scan(String.downcase(story)) |> List.flatten()
    assert "lighthouse" in words
    assert length(words) > 100
    assert length(Enum.uniq(words)) > 60
    common = ~w(a and at for had he her his in it of on she that the to was were with)
    assert Enum.count(words, &(&1 in common)) > length(words) / 5
    phrases = words |> Enum.chunk_every(8, 1, :discard) |> Enum.frequencies()
    assert phrases |> Map.values() |> Enum.max() <= 3
  end

  test "texts have transformers' ids, and come back", context do
    for {text, ids, decoded} <-
          Enum.zip([@texts, context.reference["token_ids"], context.reference["decoded"]]) do
      assert Tokenizer.encode(context.tokenizer, text) == {:ok, ids}

      assert Tokenizer.decode(context.tokenizer, ids, skip_special_tokens: false) ==
               {:ok, decoded}
    end
  end

  test "conversations render as in transformers", %{tokenizer: tokenizer, reference: reference} do
    for {chat, prompt} <- Enum.zip(@chats, reference["prompts"]) do
      assert Tokenizer.apply_chat_template(tokenizer, chat) == {:ok, prompt}
    end
  end
end
