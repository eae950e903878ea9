defmodule Bombus.BadRequestsTest do
  # Every line of "Requests": ArgumentError for what the caller wrote, and no harm to the others.
  use ExUnit.Case, async: true

  alias Bombus.{Error, Fixtures, Serving}

  setup_all do
    model = Bombus.load_model!(:demo)
    tokenizer = Bombus.load_tokenizer!(:demo)
    serving = Serving.new(model, tokenizer, max_new_tokens: 4)
    %{model: model, tokenizer: tokenizer, serving: serving, before: Serving.run(serving, "Hello")}
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

  defp wrong_options do
    [
      {:temperature, -0.1, "0 (greedy) or above, got: -0.1"},
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
      {:temprature, 0.5, "unknown option :temprature"}
    ]
  end

  defp new(context, options), do: Serving.new(context.model, context.tokenizer, options)

  defp assert_still_answers(context) do
    assert Serving.run(context.serving, "Hello") == context.before
  end

  for {name, input} <- [
        {"an empty prompt", ""},
        {"an empty :text", %{text: ""}},
        {"no messages", %{messages: []}},
        {"messages that are none", %{messages: ["hello"]}},
        {"a message without content", %{messages: [%{role: "user"}]}},
        {"no token ids", %{token_ids: []}},
        {"a negative token id", %{token_ids: [1, -1]}},
        {"a token id outside the vocabulary", %{token_ids: [1, 999_999]}},
        {"a token id that is no number", %{token_ids: [1, :two]}},
        {"invalid UTF-8", <<"caf", 0xE9>>},
        {"invalid UTF-8 in a message", %{messages: [%{role: "user", content: <<0xFF>>}]}},
        {"text that is no string", %{text: 5}},
        {"nothing to begin with", %{temperature: 0.5}},
        {"two things to begin with", %{text: "a", token_ids: [1]}},
        {"something else", 42}
      ] do
    test "#{name}", %{serving: serving} = context do
      input = unquote(Macro.escape(input))
      assert_raise ArgumentError, fn -> Serving.run(serving, input) end
      assert_raise ArgumentError, fn -> Serving.run(serving, ["Hello", input]) end
      assert_raise ArgumentError, fn -> Serving.stream(serving, input) end
      assert_still_answers(context)
    end
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

  test "a chat template that refuses the messages" do
    # The demo's template takes any role; one that does not is tested in the engine.
    assert_raise ArgumentError, ~r/:messages need a chat template/, fn ->
      model = Bombus.load_model!(:demo)
      tokenizer = %{Bombus.load_tokenizer!(:demo) | chat_template?: false}
      serving = Serving.new(model, tokenizer)
      Serving.run(serving, %{messages: [%{role: "user", content: "Hello"}]})
    end
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
    assert_raise ArgumentError, ~r/unknown keys \[:devise\]/, fn -> load(devise: :gpu) end
    assert_raise ArgumentError, ~r/:device/, fn -> load(device: :tpu) end
    assert_raise ArgumentError, ~r/:quantization/, fn -> load(quantization: :int7) end
    assert_raise ArgumentError, ~r/:max_queue/, fn -> load(max_queue: 0) end
    assert_raise ArgumentError, ~r/token ids in 0\.\./, fn -> Bombus.score(model, [1, -2]) end
    assert_raise ArgumentError, ~r/at least one token id/, fn -> Bombus.score(model, []) end
  end

  defp load(options), do: Bombus.load_model(:demo, options)

  test "a tokenizer with more tokens than the model", %{tokenizer: tokenizer} do
    model = Bombus.load_model!(Fixtures.checkpoint("f32-tied"))

    assert_raise ArgumentError, ~r/the model's own tokenizer/, fn ->
      Serving.new(model, tokenizer)
    end
  end

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
