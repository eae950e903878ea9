defmodule Bombus.MistakesTest do
  # Every public function, with things of the wrong kind in every place: what the caller's code got
  # wrong is an ArgumentError that says what was expected, what a visitor's data are is an error, and
  # nothing of the inside shows.
  use ExUnit.Case, async: true

  alias Bombus.{Embedding, Error, Hub, Quantization, Reranking, Safetensors, Serving, Tensor}
  alias Bombus.Tokenizer
  alias Bombus.Training.LoRA

  @moduletag :tmp_dir
  @moduletag :capture_log

  defmodule NoRegistry do
    def whereis_name(:nobody), do: :undefined
    def register_name(:nobody, _pid), do: :no
    def unregister_name(_name), do: :ok
    def send(_name, message), do: message
  end

  @values [
    nil,
    true,
    :word,
    NoSuchModule,
    0,
    -1,
    1.5,
    Integer.pow(10, 400),
    "",
    "a\0b",
    <<255>>,
    <<1::3>>,
    ~c"END",
    [],
    [:word],
    [nil],
    [1 | 2],
    [{:key, 1} | 2],
    [{"key", 1}],
    [{1, 2, 3}],
    [key: 1],
    %{},
    %{key: 1},
    %{"key" => 1},
    %{1 => 2},
    %{{:a, 1} => 2},
    {},
    {:word, 1},
    {:via, NoSuchModule, 1},
    {:via, NoRegistry, 1},
    {:via, Registry, 1},
    {:via, Registry, {NoSuchRegistry, 1}},
    {:global, :nobody},
    {nil, :node@nowhere},
    {:hf, 1},
    {:hf, "owner/name", 1},
    {:local, 1},
    {:demo, nil},
    Date.new!(2026, 1, 1),
    MapSet.new([1]),
    1..3,
    %Error{reason: :io, message: "a"},
    %URI{},
    &String.length/1
  ]

  @words ~r/^(expected|unknown option|did you mean|a serving without|the chat template has|there is)/

  # -> what is wrong with how a call has ended, if anything
  defp wrong(call) do
    answer = call.()
    if is_function(answer, 2) or is_struct(answer, Stream), do: Enum.take(answer, 1)
    nil
  rescue
    error in ArgumentError -> if error.message =~ @words, do: nil, else: error.message
    _error in Error -> nil
    error -> Exception.format(:error, error, Enum.take(__STACKTRACE__, 4))
  catch
    kind, reason -> Exception.format(kind, reason, Enum.take(__STACKTRACE__, 4))
  end

  defp assert_said(calls) do
    values = @values ++ [self(), make_ref(), fn -> 1 end]

    found =
      for {name, call} <- calls,
          value <- values,
          wrong = wrong(fn -> call.(value) end),
          do: "#{name} with #{inspect(value)}: #{wrong}"

    assert found == [], Enum.join(found, "\n")
  end

  # A map of one option each.
  defp with_options(what, table, call) do
    for {key, _entry} <- table, do: {"#{what}, #{key}:", &call.([{key, &1}])}
  end

  setup_all do
    model = Bombus.load_model!(:demo, device: :cpu)
    tokenizer = Bombus.load_tokenizer!(:demo)
    serving = Serving.new(model, tokenizer, max_new_tokens: 1)
    %{model: model, tokenizer: tokenizer, serving: serving, plain: Serving.new(model, nil)}
  end

  test "models, tokenizers, adapters", %{model: model, tokenizer: tokenizer, tmp_dir: dir} do
    load = Keyword.drop(Bombus.Model.Options.schema(), [:threads])

    assert_said(
      [
        {"load_model/1", &Bombus.load_model/1},
        {"load_model/2", &Bombus.load_model("none", &1)},
        {"load_tokenizer/1", &Bombus.load_tokenizer/1},
        {"load_tokenizer/2", &Bombus.load_tokenizer("none", &1)},
        {"load_adapter/1", &Bombus.load_adapter/1},
        {"load_adapter/2", &Bombus.load_adapter("none", &1)},
        {"load_adapter, scale:", &Bombus.load_adapter("none", scale: &1)},
        {"save_model/1", &Bombus.save_model(&1, dir)},
        {"save_model, path", &Bombus.save_model(model, &1)},
        {"save_model, options", &Bombus.save_model(model, dir, &1)},
        {"save_model, overwrite:", &Bombus.save_model(model, "", overwrite: &1)},
        {"score/1", &Bombus.score(&1, [1, 2])},
        {"score, ids", &Bombus.score(model, &1)},
        {"score, an id", &Bombus.score(model, [1, &1])},
        {"score, options", &Bombus.score(model, [1, 2], &1)},
        {"score, timeout:", &Bombus.score(model, [1, 2], timeout: &1)},
        {"score, adapter:", &Bombus.score(model, [1, 2], adapter: &1)},
        {"embed/3", &Bombus.embed(&1, tokenizer, ["a"])},
        {"embed, tokenizer", &Bombus.embed(model, &1, ["a"])},
        {"embed, texts", &Bombus.embed(model, tokenizer, &1)},
        {"embed, a text", &Bombus.embed(model, tokenizer, ["a", &1])},
        {"embed, options", &Bombus.embed(model, tokenizer, ["a"], &1)},
        {"rerank/4", &Bombus.rerank(&1, tokenizer, "a", ["a"])},
        {"rerank, tokenizer", &Bombus.rerank(model, &1, "a", ["a"])},
        {"rerank, query", &Bombus.rerank(model, tokenizer, &1, ["a"])},
        {"rerank, documents", &Bombus.rerank(model, tokenizer, "a", &1)},
        {"rerank, a document", &Bombus.rerank(model, tokenizer, "a", ["a", &1])},
        {"rerank, options", &Bombus.rerank(model, tokenizer, "a", ["a"], &1)},
        {"unload/1", &Bombus.unload/1},
        {"unload, options", &Bombus.unload(%{tokenizer | ref: make_ref()}, &1)}
      ] ++
        with_options("load_model", load, &Bombus.load_model("none", &1)) ++
        with_options("embed", Embedding.schema(), &Bombus.embed(model, tokenizer, ["a"], &1)) ++
        with_options(
          "rerank",
          Reranking.schema(),
          &Bombus.rerank(model, tokenizer, "a", ["a"], &1)
        )
    )
  end

  test "handles that stand for nothing", %{model: model, tokenizer: tokenizer, serving: serving} do
    adapter = Bombus.load_adapter!({:demo, "pirate"})

    for ref <- [make_ref(), nil, self(), 1, tokenizer.ref] do
      lost = %{model | ref: ref}

      for call <- [
            fn -> Bombus.score(lost, [1, 2]) end,
            fn -> Bombus.embed(lost, tokenizer, ["a"]) end,
            fn -> Bombus.rerank(lost, tokenizer, "a", ["a"]) end,
            fn -> Bombus.save_model(lost, "none") end,
            fn -> Bombus.unload(lost) end,
            fn -> Serving.new(lost, tokenizer) end,
            fn -> Serving.run(%{serving | model: lost}, "a") end,
            fn -> Serving.child_spec(name: A, model: lost, tokenizer: nil) end,
            fn -> Bombus.unload(%{adapter | ref: ref}) end,
            fn -> Bombus.score(model, [1, 2], adapter: %{adapter | ref: ref}) end,
            fn -> Serving.run(serving, %{text: "a", adapter: %{adapter | ref: ref}}) end,
            fn -> Serving.new(model, %{tokenizer | ref: model.ref}) end,
            fn -> Tokenizer.encode(%{tokenizer | ref: model.ref}, "a") end
          ] do
        raised = assert_raise ArgumentError, call
        assert raised.message =~ ~r/expected .* made by Bombus.load_/
      end
    end
  end

  test "servings", %{model: model, tokenizer: tokenizer, serving: serving, plain: plain} do
    options = Serving.Options.schema()
    name = {:global, {__MODULE__, make_ref()}}
    start_supervised!({Serving, serving: serving, name: name})

    assert_said(
      [
        {"new/1", &Serving.new(&1, tokenizer)},
        {"new, tokenizer", &Serving.new(model, &1)},
        {"new, options", &Serving.new(model, tokenizer, &1)},
        {"run, serving", &Serving.run(&1, "a")},
        {"run, input", &Serving.run(serving, &1)},
        {"run, inputs", &Serving.run(serving, ["a", &1])},
        {"run!, input", &Serving.run!(serving, &1)},
        {"run without a tokenizer", &Serving.run(plain, &1)},
        {"run, text", &Serving.run(serving, %{text: &1})},
        {"run, messages", &Serving.run(serving, %{messages: &1})},
        {"run, a message", &Serving.run(serving, %{messages: [&1]})},
        {"run, a role", &Serving.run(serving, %{messages: [%{role: &1, content: "a"}]})},
        {"run, a content", &Serving.run(serving, %{messages: [%{role: :user, content: &1}]})},
        {"run, a part", &Serving.run(serving, %{messages: [%{role: :user, content: [&1]}]})},
        {"run, token_ids", &Serving.run(serving, %{token_ids: &1})},
        {"run, an id", &Serving.run(serving, %{token_ids: [1, &1]})},
        {"run, a name", &Serving.run(serving, %{&1 => 1, :text => "a"})},
        {"stream, serving", &Serving.stream(&1, "a")},
        {"stream, input", &Serving.stream(serving, &1)},
        {"stream, input by name", &Serving.stream(name, &1)},
        {"batched_run, name", &Serving.batched_run(&1, "a")},
        {"batched_run, input", &Serving.batched_run(name, &1)},
        {"batched_run, inputs", &Serving.batched_run(name, ["a", &1])},
        {"batched_run, timeout", &Serving.batched_run(name, %{text: "a", timeout: &1})},
        {"status", &Serving.status/1},
        {"await_ready", &Serving.await_ready/1},
        {"await_ready, timeout", &Serving.await_ready(name, &1)},
        {"cancel", &Serving.cancel/1},
        {"child_spec", &Serving.child_spec/1},
        {"child_spec, name:", &Serving.child_spec(serving: serving, name: &1)},
        {"child_spec, serving:", &Serving.child_spec(serving: &1, name: A)},
        {"child_spec, model:", &Serving.child_spec(model: &1, name: A)},
        {"child_spec, tokenizer:", &Serving.child_spec(model: :demo, tokenizer: &1, name: A)},
        {"child_spec, adapter:", &Serving.child_spec(model: :demo, adapter: &1, name: A)},
        {"child_spec, drain:", &Serving.child_spec(serving: serving, drain: &1, name: A)}
      ] ++
        with_options("new", options, &Serving.new(model, tokenizer, &1)) ++
        with_options("child_spec", options, &Serving.child_spec([model: :demo, name: A] ++ &1)) ++
        with_options("run", options, &Serving.run(serving, Map.new([text: "a"] ++ &1)))
    )
  end

  test "names under which nothing can be registered", %{serving: serving} do
    Process.flag(:trap_exit, true)

    for name <- [
          {:via, NoSuchModule, 1},
          {:via, NoRegistry, 1},
          {:via, Registry, 1},
          {:via, Enum, 1},
          {:via, 1, 1}
        ] do
      raised =
        assert_raise ArgumentError, fn -> Serving.start_link(serving: serving, name: name) end

      assert raised.message =~ "expected :name to be an atom, {:global, term} or {:via, module"
    end
  end

  test "charlists that are to end a text", %{serving: serving, plain: plain, model: model} do
    for stop <- [~c"END", ~c"\n\n"] do
      for call <- [
            fn -> Serving.new(model, serving.tokenizer, stop: stop) end,
            fn -> Serving.run(serving, %{text: "a", stop: stop}) end
          ] do
        raised = assert_raise ArgumentError, call
        assert raised.message =~ "a charlist: write a string, #{inspect(List.to_string(stop))}"
      end

      # Without a tokenizer there are only ids.
      assert %{results: [_result]} =
               Serving.run(plain, %{token_ids: [1], stop: stop, max_new_tokens: 1})
    end

    for ids <- [[2], [10], [1, 106], [2, 300]] do
      assert %{results: [_result]} = Serving.run(serving, %{text: "a", stop: ids})
    end
  end

  test "tokenizers", %{tokenizer: tokenizer} do
    message = [%{role: "user", content: "a"}]

    assert_said([
      {"encode/1", &Tokenizer.encode(&1, "a")},
      {"encode, text", &Tokenizer.encode(tokenizer, &1)},
      {"encode, options", &Tokenizer.encode(tokenizer, "a", &1)},
      {"encode, special", &Tokenizer.encode(tokenizer, "a", add_special_tokens: &1)},
      {"encode!", &Tokenizer.encode!(tokenizer, &1)},
      {"decode/1", &Tokenizer.decode(&1, [1])},
      {"decode, ids", &Tokenizer.decode(tokenizer, &1)},
      {"decode, an id", &Tokenizer.decode(tokenizer, [1, &1])},
      {"decode, options", &Tokenizer.decode(tokenizer, [1], &1)},
      {"count/1", &Tokenizer.count(&1, "a")},
      {"count, input", &Tokenizer.count(tokenizer, &1)},
      {"count, a message", &Tokenizer.count(tokenizer, [&1])},
      {"count, text", &Tokenizer.count(tokenizer, %{text: &1})},
      {"count, messages", &Tokenizer.count(tokenizer, %{"messages" => &1})},
      {"count, options", &Tokenizer.count(tokenizer, "a", &1)},
      {"count, template", &Tokenizer.count(tokenizer, message, template_options: &1)},
      {"apply/1", &Tokenizer.apply_chat_template(&1, message)},
      {"apply, messages", &Tokenizer.apply_chat_template(tokenizer, &1)},
      {"apply, a message", &Tokenizer.apply_chat_template(tokenizer, [&1])},
      {"apply, options", &Tokenizer.apply_chat_template(tokenizer, message, &1)},
      {"apply, tokenize", &Tokenizer.apply_chat_template(tokenizer, message, tokenize: &1)},
      {"apply, template", &template(tokenizer, &1)},
      {"apply, tools", &template(tokenizer, %{tools: &1})},
      {"apply, a tool", &template(tokenizer, %{tools: [&1]})},
      {"apply, documents", &template(tokenizer, %{documents: &1})},
      {"apply, name", &template(tokenizer, %{chat_template: &1})},
      {"apply, prompt", &template(tokenizer, %{add_generation_prompt: &1})},
      {"apply, final", &template(tokenizer, %{continue_final_message: &1})},
      {"fit/1", &Tokenizer.fit(&1, message, 10)},
      {"fit, messages", &Tokenizer.fit(tokenizer, &1, 10)},
      {"fit, a message", &Tokenizer.fit(tokenizer, [&1], 10)},
      {"fit, tokens", &Tokenizer.fit(tokenizer, message, &1)},
      {"fit, options", &Tokenizer.fit(tokenizer, message, 10, &1)}
    ])

    raised =
      assert_raise ArgumentError, fn -> template(tokenizer, %{chat_template: 5}) end

    assert raised.message =~ ":chat_template the name of a template"
  end

  defp template(tokenizer, options) do
    message = [%{role: "user", content: "a"}]
    Tokenizer.apply_chat_template(tokenizer, message, template_options: options)
  end

  test "what JSON does not have is named, wherever it stands in a conversation", context do
    for value <- [
          {1, 2},
          {:json, 1},
          {:json, "{broken"},
          self(),
          <<1::3>>,
          [1 | 2],
          [{:a, 1}, :b],
          %{{:a, 1} => 2},
          MapSet.new([1]),
          %URI{},
          ~r/a/,
          [a: 1, a: 2]
        ],
        # A list of the pair would be an object with the name `json`.
        listed = if(match?({:json, _}, value), do: [1, value], else: [value]),
        place <- [value, listed, %{"deep" => value}, [deep: listed]] do
      message = %{role: "assistant", content: nil, tool_calls: [%{id: place}]}

      assert_raise ArgumentError,
                   ~r/^expected (a message to be of what JSON has|every name)/,
                   fn ->
                     Tokenizer.apply_chat_template(context.tokenizer, [message])
                   end

      assert_raise ArgumentError, ~r/^expected :template_options to be names and values/, fn ->
        template(context.tokenizer, %{documents: place})
      end
    end

    encoded = fn value -> value |> Bombus.OrderedJSON.encode(:any) |> IO.iodata_to_binary() end
    assert encoded.(Date.new!(2026, 1, 2)) == ~s("2026-01-02")
    assert encoded.([:nan, nil, true, 1.0e308, ~c"a"]) == ~s(["nan",null,true,1.0e308,[97]])
    assert encoded.(%{nil => 1, 2 => %{}, "a" => []}) == ~s({"2":{},"a":[],"nil":1})
    assert encoded.(Integer.pow(10, 30)) == "1" <> String.duplicate("0", 30)
  end

  test "messages may be lists of pairs, wherever messages are taken", %{tokenizer: tokenizer} do
    for message <- [
          [role: "user", content: "Hello"],
          [{"role", "user"}, {"content", "Hello"}],
          %{"role" => :user, "content" => "Hello"}
        ] do
      messages = [message, [role: :assistant, content: "Hi"], message]
      {:ok, all} = Tokenizer.count(tokenizer, messages)
      assert Tokenizer.count(tokenizer, %{"messages" => messages}) == {:ok, all}
      assert Tokenizer.fit(tokenizer, messages, all) == {:ok, messages}
      assert Tokenizer.fit(tokenizer, messages, all - 1) == {:ok, [message]}
    end
  end

  test "files of tensors", %{tmp_dir: dir} do
    path = Path.join(dir, "a.safetensors")
    tensor = Tensor.new({:u, 8}, {2}, "ab")
    :ok = Safetensors.write(path, %{"a" => tensor})

    assert_said([
      {"read", &Safetensors.read/1},
      {"read, options", &Safetensors.read(path, &1)},
      {"read, only:", &Safetensors.read(path, only: &1)},
      {"read, a name", &Safetensors.read(path, only: ["a", &1])},
      {"read, as:", &Safetensors.read(path, as: &1)},
      {"read_header", &Safetensors.read_header/1},
      {"read_tensor", &Safetensors.read_tensor(&1, "a")},
      {"read_tensor, name", &Safetensors.read_tensor(path, &1)},
      {"read_tensor, options", &Safetensors.read_tensor(path, "a", &1)},
      {"write", &Safetensors.write(&1, %{"a" => tensor})},
      {"write, tensors", &Safetensors.write(path, &1)},
      {"write, a tensor", &Safetensors.write(path, %{"a" => &1})},
      {"write, a name", &Safetensors.write(path, %{&1 => tensor})},
      {"write, options", &Safetensors.write(path, %{"a" => tensor}, &1)},
      {"write, metadata:", &Safetensors.write(path, %{"a" => tensor}, metadata: &1)},
      {"write, a value", &Safetensors.write(path, %{}, metadata: %{"a" => &1})},
      {"write, a key", &Safetensors.write(path, %{}, metadata: %{&1 => "a"})},
      {"a type", &Safetensors.write(path, %{"a" => %{tensor | type: &1}})},
      {"a shape", &Safetensors.write(path, %{"a" => %{tensor | shape: &1}})},
      {"a binary", &Safetensors.write(path, %{"a" => %{tensor | binary: &1}})},
      {"new, type", &Tensor.new(&1, {2}, "ab")},
      {"new, bits", &Tensor.new({:u, &1}, {2}, "ab")},
      {"new, shape", &Tensor.new({:u, 8}, &1, "ab")},
      {"new, axis", &Tensor.new({:u, 8}, {1, &1}, "ab")},
      {"new, binary", &Tensor.new({:u, 8}, {2}, &1)},
      {"from_nx", &Tensor.from_nx/1},
      {"to_nx", &Tensor.to_nx/1}
    ])
  end

  test "quantized matrices" do
    tensor = Tensor.new({:f, 32}, {1, 64}, :binary.copy(<<0, 0, 128, 63>>, 64))
    {weight, scales, biases} = Quantization.quantize(tensor)

    assert_said([
      {"quantize", &Quantization.quantize/1},
      {"quantize, group", &Quantization.quantize(tensor, &1)},
      {"quantize, bits", &Quantization.quantize(tensor, 64, &1)},
      {"quantize, options", &Quantization.quantize(tensor, 64, 4, &1)},
      {"quantize, mode", &Quantization.quantize(tensor, 64, 4, mode: &1)},
      {"quantize, device", &Quantization.quantize(tensor, 64, 4, device: &1)},
      {"dequantize", &Quantization.dequantize(&1, scales, biases)},
      {"dequantize, scales", &Quantization.dequantize(weight, &1, biases)},
      {"dequantize, biases", &Quantization.dequantize(weight, scales, &1)},
      {"dequantize, group", &Quantization.dequantize(weight, scales, biases, &1)},
      {"matmul", &Quantization.quantized_matmul(&1, weight, scales, biases)},
      {"matmul, weight", &Quantization.quantized_matmul(tensor, &1, scales, biases)},
      {"matmul, scales", &Quantization.quantized_matmul(tensor, weight, &1, biases)},
      {"matmul, biases", &Quantization.quantized_matmul(tensor, weight, scales, &1)},
      {"matmul, transpose", &Quantization.quantized_matmul(tensor, weight, scales, biases, &1)}
    ])
  end

  test "the Hub", %{tmp_dir: dir} do
    here = [cache_dir: dir, offline: true]
    source = Hub.Options.schema()

    assert_said(
      [
        {"download", &Hub.download(&1, here)},
        {"download, options", &Hub.download("owner/name", offline(&1))},
        {"download, kind:", &Hub.download("owner/name", [kind: &1] ++ here)},
        {"cached?", &Hub.cached?/1},
        {"cached?, source", &Hub.cached?({:hf, &1, here})},
        {"cached?, options", &Hub.cached?({:hf, "owner/name", &1})},
        {"cached?, kind", &Hub.cached?({:hf, "owner/name", here}, &1)},
        {"cached", &Hub.cached/1},
        {"cached, cache_dir:", &Hub.cached(cache_dir: &1)},
        {"delete", &Hub.delete/1},
        {"delete, source", &Hub.delete({:hf, &1, here})},
        {"delete, options", &Hub.delete({:hf, "owner/name", &1})}
      ] ++
        with_options("a source", source, &Bombus.load_model({:hf, "owner/name", &1 ++ here}))
    )
  end

  # None of them may go to a network.
  defp offline(options) when options in [[], nil], do: [offline: true]
  defp offline(options), do: options

  test "trainings", %{tmp_dir: dir} do
    train = [base_model: :demo, training_data: "none", output_path: Path.join(dir, "out")]
    table = Bombus.Training.LoRA.Options.schema(:train)
    prepare = Bombus.Training.LoRA.Options.schema(:prepare)
    # One that is over: nobody waits for it.
    File.write!(Path.join(dir, "training.jsonl"), ~s({"type": "done", "path": "a"}\n))

    assert_said(
      [
        {"prepare_data", &LoRA.prepare_data(&1, dir)},
        {"prepare_data, a row", &LoRA.prepare_data([&1], dir)},
        {"prepare_data, dir", &LoRA.prepare_data([], &1)},
        {"prepare_data, options", &LoRA.prepare_data([], dir, &1)},
        {"train", &LoRA.train/1},
        {"cancel", &LoRA.cancel/1},
        {"monitor_training", &LoRA.monitor_training(&1, timeout: 0)},
        {"monitor_training, options", &LoRA.monitor_training(dir, &1)},
        {"monitor_training, timeout:", &LoRA.monitor_training(dir, timeout: &1)},
        {"estimate", &LoRA.estimate_training_time(&1, :demo)},
        {"estimate, model", &LoRA.estimate_training_time(1, &1)}
      ] ++
        with_options("train", table, &LoRA.train(Keyword.merge(train, &1))) ++
        with_options("prepare_data", prepare, &LoRA.prepare_data(["a"], dir, &1))
    )
  end
end
