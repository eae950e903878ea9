defmodule Bombus.BadRequestsTest do
  # Every line of "Requests": ArgumentError for what the caller wrote, and no harm to the others.
  use ExUnit.Case, async: true

  alias Bombus.{Error, Fixtures, Serving}

  setup_all do
    model = Bombus.load_model!(:demo)
    tokenizer = Bombus.load_tokenizer!(:demo)
    serving = Serving.new(model, tokenizer, max_new_tokens: 4)
    before = Fixtures.plain(Serving.run(serving, "Hello"))
    %{model: model, tokenizer: tokenizer, serving: serving, before: before}
  end

  test "wrong options, of a request and of a serving", %{serving: serving} = context do
    for {key, value, words} <- wrong_options() do
      input = %{key => value, text: "Hi"}
      raised = assert_raise ArgumentError, fn -> Serving.run(serving, input) end
      assert raised.message =~ words
      raised = assert_raise ArgumentError, fn -> new(context, [{key, value}]) end
      assert raised.message =~ words
    end

    assert_still_answers(context)
  end

  test "options that do not go with the model are refused when a serving is made", context do
    for {options, tokenizer} <- [
          {[stop: 999_999], context.tokenizer},
          {[logit_bias: %{999_999 => 1}], context.tokenizer},
          {[template_options: %{enable_thinking: false}], context.tokenizer},
          {[stop: "a"], nil}
        ] do
      assert_raise ArgumentError, fn -> Serving.new(context.model, tokenizer, options) end
    end
  end

  test "a name that is not UTF-8 is unknown like any other", %{serving: serving} do
    assert_raise ArgumentError, ~r/unknown/, fn ->
      Serving.run(serving, %{:text => "a", <<255>> => 2})
    end
  end

  defp wrong_options do
    [
      {:temperature, -0.1, "a number, 0 (greedy) or above"},
      {:temperature, :nan, "got: :nan"},
      {:temperature, "hot", "got: \"hot\""},
      {:top_p, 2, "expected :top_p to be in 0.0..1.0, got: 2"},
      {:top_p, -0.5, "expected :top_p to be in 0.0..1.0"},
      {:min_p, 1.5, "expected :min_p to be in 0.0..1.0"},
      {:top_k, -1, "expected :top_k"},
      {:top_k, 1.5, "expected :top_k"},
      {:max_new_tokens, -1, "expected :max_new_tokens"},
      {:max_new_tokens, 2.5, "expected :max_new_tokens"},
      {:repetition_penalty, 0, "expected :repetition_penalty to be a number above 0"},
      {:seed, -1, "expected :seed"},
      {:seed, 0x1_0000_0000_0000_0000, "expected :seed"},
      {:stop, "", "none of them empty"},
      {:stop, [:end], "expected :stop"},
      {:adapter, "pirate", "Bombus.load_adapter/2"},
      {:chat_template, "no", "true or false"},
      {:template_options, 1, "a map or a keyword list"},
      {:template_options, %{a: self()}, "as in JSON"},
      {:compile, [sequence_length: 0], "sequence_length: n"},
      {:temprature, 0.5, "unknown option :temprature"}
    ]
  end

  defp new(context, options), do: Serving.new(context.model, context.tokenizer, options)

  defp assert_still_answers(context) do
    assert Fixtures.plain(Serving.run(context.serving, "Hello")) == context.before
  end

  # What a visitor typed is data: an error, in its place, and nobody else's.
  for {name, input} <- [
        {"an empty prompt", ""},
        {"an empty :text", %{text: ""}},
        {"no messages", %{messages: []}},
        {"invalid UTF-8", <<"caf", 0xE9>>},
        {"invalid UTF-8 under a string", %{"text" => <<"caf", 0xE9>>}},
        {"invalid UTF-8 in a message", %{messages: [%{role: "user", content: <<0xFF>>}]}}
      ] do
    test "#{name} is an error, not a raise", %{serving: serving} = context do
      input = unquote(Macro.escape(input))
      assert {:error, %Error{reason: :bad_request} = error} = Serving.run(serving, input)
      assert [one, {:error, ^error}] = Serving.run(serving, ["Hello", input])
      assert Fixtures.plain(one) == context.before
      stream = Serving.stream(serving, input)
      assert_raise Error, error.message, fn -> Enum.to_list(stream) end
      stream = Serving.run(serving, %{text: "", stream: true})
      assert_raise Error, fn -> Enum.to_list(stream) end
      assert_raise Error, fn -> Serving.run!(serving, input) end
      assert_still_answers(context)
    end
  end

  test "a text of spaces is one", %{serving: serving} do
    assert %{results: [_one]} = Serving.run(serving, "  \n ")
    assert %{results: [_one]} = Serving.run(serving, %{text: " ", chat_template: false})
  end

  for {name, input, words} <- [
        {"messages that are none", %{messages: ["hello"]}, "expected a message"},
        {"messages that end in one", %{messages: [%{role: "user", content: "a"} | 1]}, "a list"},
        {"a message without content", %{messages: [%{role: "user"}]}, "expected a message"},
        {"no token ids", %{token_ids: []}, "at least one"},
        {"a negative token id", %{token_ids: [1, -1]}, "got: -1"},
        {"a token id outside the vocabulary", %{token_ids: [1, 999_999]}, "got: 999999"},
        {"a token id that is no number", %{token_ids: [1, :two]}, "got: :two"},
        {"a token id that is nil", %{token_ids: [1, nil]}, "got: nil"},
        {"token ids that end in one", %{token_ids: [1 | 2]}, "a list"},
        {"a message with what is not JSON", %{messages: [%{role: "user", content: "a", x: {1}}]},
         "expected a message"},
        {"text that is no string", %{text: 5}, "expected :text to be a string, got: 5"},
        {"text that is a charlist", %{text: ~c"Hi"}, "a charlist: write a string"},
        {"nothing to begin with", %{temperature: 0.5}, "exactly one of"},
        {"two things to begin with", %{text: "a", token_ids: [1]}, "exactly one of"},
        {"a name twice", %{:text => "a", "text" => "b"}, "every name once"},
        {"something else", 42, "got: 42"},
        {"a name that is none", %{"text" => "a", "tmeperature" => 1},
         "did you mean :temperature?"},
        {"another API's name", %{:text => "a", "max_tokens" => 1},
         "did you mean :max_new_tokens?"},
        {"a number for a name", %{1 => "a", text: "a"}, "unknown option 1"},
        {"more that must come than may", %{text: "a", min_new_tokens: 9, max_new_tokens: 8},
         "expected :min_new_tokens to be at most :max_new_tokens, which is 8, got: 9"},
        {"a bias list that is none", %{text: "a", logit_bias: [{1, 2.0} | 3]}, ":logit_bias"},
        {"stop strings that are none", %{text: "a", stop: ["a" | "b"]}, ":stop"}
      ] do
    test "#{name}", %{serving: serving} = context do
      input = unquote(Macro.escape(input))
      words = unquote(words)

      for run <- [
            fn -> Serving.run(serving, input) end,
            fn -> Serving.run(serving, ["Hello", input]) end,
            fn -> Serving.stream(serving, input) end
          ] do
        assert Exception.message(assert_raise(ArgumentError, run)) =~ words
      end

      assert_still_answers(context)
      assert Process.info(self(), :messages) == {:messages, []}
    end
  end

  test "lists that are none of inputs", %{serving: serving} do
    for {inputs, words} <- [
          {~c"Write a post", "a charlist: write a string"},
          {[1, 15, 27], "for token ids write %{token_ids: ids}"},
          {[text: "x"], "a keyword list: write %{text: ...}"},
          {["a" | "b"], "got: [\"a\" | \"b\"]"}
        ] do
      raised = assert_raise ArgumentError, fn -> Serving.run(serving, inputs) end
      assert raised.message =~ words
      assert_raise ArgumentError, fn -> Serving.stream(serving, inputs) end
    end

    assert Serving.run(serving, []) == []

    assert_raise ArgumentError, ~r/cannot be streamed/, fn ->
      Serving.run(serving, [%{text: "a", stream: true}])
    end
  end

  test "names may be strings, as they come out of JSON", context do
    input = JSON.decode!(~s({"text": "Hello", "max_new_tokens": 2}))
    assert %{results: [%{token_ids: ids}]} = Serving.run(context.serving, input)
    assert length(ids) == 2
    messages = %{"messages" => [%{"role" => "user", "content" => "Hello"}]}
    assert Fixtures.plain(Serving.run(context.serving, messages)) == context.before
  end

  test "a prompt longer than the context", %{serving: serving, model: model} do
    long = %{token_ids: List.duplicate(5, model.spec.context + 1)}
    assert {:error, %Error{reason: :prompt_too_long} = error} = Serving.run(serving, long)
    assert error.message =~ "#{model.spec.context}"
    assert [{:error, ^error}, %{results: [_one]}] = Serving.run(serving, [long, "Hello"])
    assert_raise Error, fn -> Serving.run!(serving, long) end
    assert_raise Error, fn -> Enum.to_list(Serving.stream(serving, long)) end
  end

  test "a prompt as long as the context ends at once" do
    model = Bombus.load_model!(Fixtures.checkpoint("f32-eos-list"))
    serving = Serving.new(model, nil, max_new_tokens: 5)

    run = fn count ->
      %{results: [result]} = Serving.run(serving, %{token_ids: List.duplicate(5, count)})
      result
    end

    assert %{token_ids: [], finish_reason: :length} = run.(model.spec.context)
    assert %{token_ids: [_one], finish_reason: :length} = run.(model.spec.context - 1)
  end

  test "messages for a tokenizer without a chat template", context do
    tokenizer = %{context.tokenizer | chat_template?: false}
    serving = Serving.new(context.model, tokenizer)

    assert_raise ArgumentError, ~r/:messages need a chat template/, fn ->
      Serving.run(serving, %{messages: [%{role: "user", content: "Hello"}]})
    end
  end

  @tag :tmp_dir
  test "a chat template that refuses the messages", %{tmp_dir: dir, model: model} do
    folder = Fixtures.copy(Application.app_dir(:bombus, "priv/models/demo"), dir)
    template = "{{ raise_exception('roles must alternate') }}"
    Fixtures.edit_json(folder, "tokenizer_config.json", &Map.put(&1, "chat_template", template))
    serving = Serving.new(model, Bombus.load_tokenizer!(folder), max_new_tokens: 2)
    assert {:error, %Error{reason: :bad_request} = error} = Serving.run(serving, "Hello")
    assert error.message =~ "roles must alternate"
    assert %{results: [_one]} = Serving.run(serving, %{text: "Hello", chat_template: false})
  end

  test "text for a serving without a tokenizer", %{model: model} do
    serving = Serving.new(model, nil)
    assert_raise ArgumentError, ~r/:token_ids only/, fn -> Serving.run(serving, "Hello") end
  end

  test "what is no model, tokenizer or source", %{model: model} do
    assert_raise ArgumentError, ~r/a model made by/, fn -> Serving.new(:demo, nil) end
    assert_raise ArgumentError, ~r/a tokenizer made by/, fn -> Serving.new(model, :demo) end
    assert_raise ArgumentError, ~r/a model made by/, fn -> Bombus.score(:demo, [1]) end
    assert_raise ArgumentError, ~r/expected a source/, fn -> Bombus.load_model(:dmeo) end
    assert_raise ArgumentError, ~r/:devise, did you mean :device\?/, fn -> load(devise: :gpu) end
    assert_raise ArgumentError, ~r/:device/, fn -> load(device: :tpu) end
    assert_raise ArgumentError, ~r/:threads/, fn -> load(threads: 0) end
    assert_raise ArgumentError, ~r/:threads/, fn -> load(threads: 2.5) end
    assert_raise ArgumentError, ~r/:device/, fn -> load(backend: {EXLA, device: :tpu}) end
    assert_raise ArgumentError, ~r/:backend/, fn -> load(backend: {EXLA, :cpu}) end
    assert_raise ArgumentError, ~r/:backend/, fn -> load(backend: "EXLA") end
    assert_raise ArgumentError, ~r/unknown option/, fn -> Bombus.load_tokenizer(:demo, a: 1) end
    assert_raise ArgumentError, ~r/keyword list/, fn -> Bombus.load_model(:demo, :cpu) end
    assert_raise ArgumentError, ~r/keyword list/, fn -> Serving.new(model, nil, %{seed: 1}) end
    assert_raise ArgumentError, ~r/a serving made by/, fn -> Serving.run(model, "Hello") end
    assert_raise ArgumentError, ~r/batched_run/, fn -> Serving.run(MyLLM, "Hello") end
    serving = Serving.new(model, nil)
    assert_raise ArgumentError, ~r/run\/2/, fn -> Serving.batched_run(serving, "Hello") end
    assert_raise ArgumentError, ~r/serving: or model:/, fn -> Serving.child_spec(serving) end
    assert_raise ArgumentError, ~r/:quantization/, fn -> load(quantization: :int7) end
    assert_raise ArgumentError, ~r/:max_queue/, fn -> load(max_queue: 0) end
    assert_raise ArgumentError, ~r/token ids in 0\.\./, fn -> Bombus.score(model, [1, -2]) end
    assert_raise ArgumentError, ~r/at least one token id/, fn -> Bombus.score(model, []) end
  end

  defp load(options), do: Bombus.load_model(:demo, options)

  test "are no faults: seed 0, max_new_tokens 0, top_p 0 and 1", %{serving: serving} do
    assert %{results: [%{text: "", finish_reason: :length, token_ids: []}]} =
             Serving.run(serving, %{text: "Hello", max_new_tokens: 0})

    greedy = Serving.run(serving, "Hello")
    assert Serving.run(serving, %{text: "Hello", temperature: 2.0, top_p: 0}) == greedy
    assert Serving.run(serving, %{text: "Hello", temperature: 2.0, top_k: 1}) == greedy
    assert Serving.run(serving, %{text: "Hello", temperature: 2.0, min_p: 1}) == greedy
    zero = %{text: "Hello", temperature: 1.5, seed: 0, top_p: 1}
    assert Serving.run(serving, zero) == Serving.run(serving, zero)
  end
end
