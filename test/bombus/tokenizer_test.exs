defmodule Bombus.TokenizerTest do
  use ExUnit.Case, async: true

  alias Bombus.{Error, Fixtures, Serving, Tokenizer}

  @moduletag :tmp_dir
  @demo Application.app_dir(:bombus, "priv/models/demo")
  @prompt "Write a post about coffee"

  setup_all do
    %{model: Bombus.load_model!(:demo, device: :cpu), tokenizer: Bombus.load_tokenizer!(:demo)}
  end

  defp conversation(text \\ @prompt), do: [%{role: "user", content: text}]

  defp rendered(text), do: "<|im_start|>user\n#{text}<|im_end|>\n<|im_start|>assistant\n"

  defp run(model, tokenizer, input, options \\ []) do
    serving = Serving.new(model, tokenizer, Keyword.put_new(options, :max_new_tokens, 3))
    with %{results: [result]} <- Serving.run(serving, input), do: result
  end

  # A copy of the demo tokenizer whose files are changed.
  defp copy(tmp_dir, changes) do
    folder = Fixtures.copy(@demo, tmp_dir)
    for {file, change} <- changes, do: Fixtures.edit_json(folder, file, change)
    folder
  end

  describe "encode, decode and count" do
    test "are each other's inverse, with special tokens or without", %{tokenizer: tokenizer} do
      text = "Grüße 🐝 <|im_end|> 漢字"
      {:ok, ids} = Tokenizer.encode(tokenizer, text)
      assert 2 in ids
      assert Tokenizer.decode(tokenizer, ids) == {:ok, "Grüße 🐝  漢字"}
      assert Tokenizer.decode(tokenizer, ids, skip_special_tokens: false) == {:ok, text}
      assert Tokenizer.count(tokenizer, text) == {:ok, length(ids)}
      assert Tokenizer.encode!(tokenizer, text, add_special_tokens: false) == ids
      assert Tokenizer.decode!(tokenizer, []) == ""
      assert Tokenizer.count!(tokenizer, "") == 0
    end

    test "an id without a token has no text", %{tokenizer: tokenizer} do
      {:ok, [a]} = Tokenizer.encode(tokenizer, "a")
      assert Tokenizer.decode(tokenizer, [a, 0xFFFFFFFF, a]) == {:ok, "aa"}
    end

    test "count what a request takes", %{model: model, tokenizer: tokenizer} do
      assert {:ok, 18} = Tokenizer.count(tokenizer, conversation())
      assert {:ok, 18} = Tokenizer.count(tokenizer, %{text: @prompt})
      assert {:ok, 18} = Tokenizer.count(tokenizer, %{messages: conversation()})
      assert run(model, tokenizer, @prompt).token_summary.input == 18
      {:ok, count} = Tokenizer.count(tokenizer, @prompt)
      completed = %{text: @prompt, chat_template: false}
      assert run(model, tokenizer, completed).token_summary.input == count
    end

    test "are of use for a score and a bias", %{model: model, tokenizer: tokenizer} do
      {:ok, ids} = Tokenizer.encode(tokenizer, @prompt)
      assert {:ok, logprobs} = Bombus.score(model, ids)
      assert length(logprobs) == length(ids) - 1
      {:ok, [bee | _]} = Tokenizer.encode(tokenizer, " bee")

      assert %{token_ids: [^bee | _]} =
               run(model, tokenizer, %{text: "x", logit_bias: %{bee => 1.0e6}})
    end
  end

  test "a chat template as text and as ids", %{tokenizer: tokenizer} do
    assert Tokenizer.apply_chat_template(tokenizer, conversation("hi")) == {:ok, rendered("hi")}
    {:ok, ids} = Tokenizer.apply_chat_template(tokenizer, conversation("hi"), tokenize: true)
    assert ids == Tokenizer.encode!(tokenizer, rendered("hi"), add_special_tokens: false)

    assert Tokenizer.apply_chat_template!(tokenizer, conversation("hi"),
             add_generation_prompt: false
           ) == "<|im_start|>user\nhi<|im_end|>\n"
  end

  describe "a conversation that is too long" do
    test "loses its oldest turns", %{tokenizer: tokenizer} do
      call = %{role: "assistant", content: "call"}
      result = %{role: "tool", content: "result"}
      system = %{role: "system", content: "be kind"}
      turn = fn n -> [%{role: "user", content: "question #{n}"}, call, result] end
      last = %{role: "user", content: "the last"}
      messages = [system] ++ turn.(1) ++ turn.(2) ++ turn.(3) ++ [last]

      all = Tokenizer.count!(tokenizer, messages)
      assert Tokenizer.fit(tokenizer, messages, all) == {:ok, messages}
      fewer = [system] ++ turn.(2) ++ turn.(3) ++ [last]
      assert Tokenizer.fit(tokenizer, messages, all - 1) == {:ok, fewer}
      least = Tokenizer.count!(tokenizer, [system, last])
      assert Tokenizer.fit!(tokenizer, messages, least) == [system, last]

      assert {:error, %Error{reason: :prompt_too_long}} =
               Tokenizer.fit(tokenizer, messages, least - 1)
    end

    test "may be one turn, or none", %{tokenizer: tokenizer} do
      assert Tokenizer.fit(tokenizer, conversation(), 18) == {:ok, conversation()}
      system = [%{"role" => "system", "content" => "x"}]
      assert Tokenizer.fit(tokenizer, system, 100) == {:ok, system}
      assert {:error, %Error{reason: :prompt_too_long}} = Tokenizer.fit(tokenizer, system, 1)
    end
  end

  test "what is wrong with a text is an error, what is wrong with a call is raised",
       %{tokenizer: tokenizer, tmp_dir: tmp_dir} do
    assert {:error, %Error{reason: :bad_request}} = Tokenizer.encode(tokenizer, <<0xFF>>)
    assert {:error, %Error{reason: :bad_request}} = Tokenizer.count(tokenizer, [])
    assert_raise Error, fn -> Tokenizer.encode!(tokenizer, <<0xFF>>) end

    for ids <- [[-1], ["a"], :ids, [1 | 2], [0x1_0000_0000]] do
      assert_raise ArgumentError, ~r/token ids/, fn -> Tokenizer.decode(tokenizer, ids) end
    end

    assert_raise ArgumentError, ~r/expected a text/, fn -> Tokenizer.encode(tokenizer, 1) end
    assert_raise ArgumentError, ~r/a tokenizer made by/, fn -> Tokenizer.encode("x", "y") end

    assert_raise ArgumentError, ~r/did you mean/, fn ->
      Tokenizer.encode(tokenizer, "x", add_special_token: true)
    end

    folder =
      copy(tmp_dir, [{"tokenizer_config.json", &Map.delete(&1, "chat_template")}])

    plain = Bombus.load_tokenizer!(folder)

    assert {:error, %Error{message: message}} =
             Tokenizer.apply_chat_template(plain, conversation())

    assert message =~ "no chat template"
  end

  test "inspect shows what it is", %{tokenizer: tokenizer} do
    shown = inspect(tokenizer)
    assert shown =~ "vocab_size: 1280" and shown =~ ~s(eos_token: "<|im_end|>")
    refute shown =~ "#Reference"
  end

  describe "stop" do
    # Ids of the demo model: 2 is <|im_end|>, which ends no text here.
    setup %{tmp_dir: tmp_dir} do
      eos = &Map.put(&1, "eos_token", "<|endoftext|>")
      folder = copy(tmp_dir, [{"tokenizer_config.json", eos}])
      Fixtures.edit_json(folder, "generation_config.json", fn _ -> %{"eos_token_id" => 0} end)
      Fixtures.edit_json(folder, "config.json", &Map.put(&1, "eos_token_id", 0))

      %{
        model: Bombus.load_model!(folder, device: :cpu),
        tokenizer: Bombus.load_tokenizer!(folder)
      }
    end

    test "at a special token, by its text and by its id", %{model: model, tokenizer: tokenizer} do
      input = %{text: "x", logit_bias: %{2 => 1.0e6}}
      assert %{token_ids: [2, 2, 2], finish_reason: :length} = run(model, tokenizer, input)

      for stop <- ["<|im_end|>", ["never", "<|im_end|>"], 2, [7, 2]] do
        assert %{token_ids: [], text: "", finish_reason: :stop} =
                 run(model, tokenizer, input, stop: stop)
      end

      assert %{text: "", finish_reason: :stop} =
               run(model, tokenizer, input, stop: ["<|im_end|><|im_end|>"])
    end

    test "not before there are min_new_tokens", %{model: model, tokenizer: tokenizer} do
      input = %{text: "x", logit_bias: %{2 => 1.0e3}, min_new_tokens: 2}

      assert %{token_ids: [_, _] = ids, finish_reason: :stop} =
               run(model, tokenizer, input, stop: 2)

      refute 2 in ids
    end

    test "by ids without a tokenizer", %{model: model} do
      input = %{token_ids: [67], logit_bias: %{2 => 1.0e6}}
      assert %{token_ids: [], finish_reason: :stop} = run(model, nil, input, stop: [2])

      assert_raise ArgumentError, ~r/no text for :stop/, fn ->
        run(model, nil, input, stop: "a")
      end

      assert_raise ArgumentError, ~r/token ids in 0\.\./, fn ->
        run(model, nil, input, stop: 9999)
      end
    end

    test "has a bound", %{model: model, tokenizer: tokenizer} do
      many = Enum.map(1..1025, &"stop #{&1}")

      assert_raise ArgumentError, ~r/at most 1024/, fn ->
        run(model, tokenizer, "x", stop: many)
      end

      assert_raise ArgumentError, ~r/none of them empty/, fn ->
        run(model, tokenizer, "x", stop: [""])
      end
    end
  end

  describe "files" do
    test "eos in special_tokens_map.json alone ends a text", %{model: model, tmp_dir: tmp_dir} do
      folder = copy(tmp_dir, [{"tokenizer_config.json", &Map.delete(&1, "eos_token")}])
      File.write!(Path.join(folder, "special_tokens_map.json"), ~s({"eos_token": "<|im_start|>"}))
      tokenizer = Bombus.load_tokenizer!(folder)

      assert %{finish_reason: :stop} =
               run(model, tokenizer, %{text: "x", logit_bias: %{1 => 1.0e6}})
    end

    test "more tokens than the model has rows: only a text with one of them is refused",
         %{tokenizer: tokenizer} do
      model = Bombus.load_model!(Fixtures.checkpoint("f32-tied"))
      assert tokenizer.vocab_size > model.spec.vocab_size
      assert %{token_ids: [_ | _]} = run(model, tokenizer, %{text: "x", chat_template: false})

      assert {:error, %Error{reason: :bad_request, message: message}} =
               run(model, tokenizer, %{text: "Write a post about coffee"})

      assert message =~ "outside the vocabulary"
    end

    test "that are links, folders or no JSON are errors", %{tmp_dir: tmp_dir} do
      for {file, index} <-
            Enum.with_index(~w(tokenizer.json tokenizer_config.json special_tokens_map.json)) do
        folder = Fixtures.copy(@demo, tmp_dir)
        path = Path.join(folder, file)
        File.rm(path)
        if rem(index, 2) == 0, do: File.ln_s!("/dev/zero", path), else: File.mkdir!(path)
        assert {:error, %Error{message: message}} = Bombus.load_tokenizer(folder)
        assert message =~ file
        File.rm_rf!(path)
        File.write!(path, "<html>")
        assert {:error, %Error{message: message}} = Bombus.load_tokenizer(folder)
        assert message =~ file
      end
    end
  end

  test "a result says that it ended in the middle of thinking", %{model: model, tmp_dir: tmp_dir} do
    folder = copy(tmp_dir, [])
    always = "{{ messages[0].content }}<think>\n"
    File.write!(Path.join(folder, "chat_template.jinja"), always)
    tokenizer = Bombus.load_tokenizer!(folder)
    free = Bombus.load_tokenizer!(:demo)
    one = %{text: "x", max_new_tokens: 1}
    assert %{unfinished_thinking: true, finish_reason: :length} = run(model, tokenizer, one)
    assert %{unfinished_thinking: false} = run(model, free, "x")
    [open, close] = Enum.map(["<think>", "</think>"], &Tokenizer.encode!(free, &1))
    assert length(open) > 1
    ids = Tokenizer.encode!(free, "x<think>")
    assert %{unfinished_thinking: true} = run(model, free, %{token_ids: ids, max_new_tokens: 1})
    ids = ids ++ close
    assert %{unfinished_thinking: false} = run(model, free, %{token_ids: ids, max_new_tokens: 1})
  end

  describe "long texts" do
    test "that cannot fit are refused at once", %{model: model, tokenizer: tokenizer} do
      for text <- [String.duplicate("7", 20_000_000), String.duplicate("coffee ", 1_000_000)] do
        assert {:error, %Error{reason: :prompt_too_long, message: message}} =
                 run(model, tokenizer, text)

        assert message =~ "where the context is #{model.spec.context}"
      end
    end

    test "do not hold up short ones, and end with their callers", %{tokenizer: tokenizer} do
      text = String.duplicate("coffee 12 ", 400_000)

      callers =
        for _ <- 1..8 do
          spawn(fn -> Tokenizer.count(tokenizer, text) end)
        end

      assert {:ok, _count} = Tokenizer.count(tokenizer, "hi")
      assert Enum.any?(callers, &Process.alive?/1)
      Enum.each(callers, &Process.exit(&1, :kill))
      assert {:ok, 1_200_000} = Tokenizer.count(tokenizer, String.duplicate("7 ", 600_000) <> "a")
    end
  end
end
