defmodule Bombus.ServingTest do
  use ExUnit.Case

  import Bombus.Fixtures, only: [assert_soon: 1]

  alias Bombus.{Error, Fixtures, Serving}

  setup_all do
    model = Bombus.load_model!(:demo)
    tokenizer = Bombus.load_tokenizer!(:demo)
    %{model: model, tokenizer: tokenizer, serving: Serving.new(model, tokenizer)}
  end

  # A model that does not end by itself: random weights, no eos among its greedy tokens.
  defp endless(options \\ []) do
    model = Bombus.load_model!(Fixtures.checkpoint("f32-untied"), options)
    {Serving.new(model, nil, max_new_tokens: 400), %{token_ids: [3, 1, 4, 1, 5]}}
  end

  # The answer, whatever was cached.
  defp run(serving, input), do: Fixtures.plain(Serving.run(serving, input))

  defp text(%{results: [%{text: text}]}), do: text
  defp ids(%{results: [%{token_ids: ids}]}), do: ids

  defp free?(info \\ Bombus.memory_info()), do: info.sequences == 0 and info.kv == 0

  test "a result is Bumblebee's, with more", %{serving: serving} do
    %{results: [result]} = Serving.run(serving, "Write a post about coffee")
    assert result.text =~ ~r/coffee/i
    assert result.finish_reason == :stop
    output = length(result.token_ids)
    assert %{input: input, output: ^output, padding: 0} = result.token_summary
    assert input > 5 and output > 5
  end

  test "a stream is the run, piece by piece", %{serving: serving} do
    prompt = "Write a post about coffee"
    pieces = serving |> Serving.stream(prompt) |> Enum.to_list()
    assert length(pieces) > 10
    assert Enum.join(pieces) == text(Serving.run(serving, prompt))
  end

  test "stream: true streams, stream_done: true ends with the result", context do
    options = [stream: true, stream_done: true, max_new_tokens: 10]
    serving = Serving.new(context.model, context.tokenizer, options)
    elements = serving |> Serving.run("Write a post about tea") |> Enum.to_list()
    {pieces, [{:done, result}]} = Enum.split(elements, -1)
    assert Enum.join(pieces) == text(result)
    assert %{results: [%{finish_reason: :length, token_summary: %{output: 10}}]} = result
  end

  test "a request may stream, a list may not", %{serving: serving} do
    input = %{text: "Write a post about tea", stream: true, max_new_tokens: 5}
    assert serving |> Serving.run(input) |> Enum.join() |> String.length() > 5
    assert_raise ArgumentError, ~r/cannot be streamed/, fn -> Serving.run(serving, [input]) end
  end

  test "compile: [sequence_length: n] bounds prompt and text", %{model: model} do
    serving = Serving.new(model, nil, compile: [batch_size: 1, sequence_length: 10])
    result = Serving.run(serving, %{token_ids: [1, 2, 3, 4, 5, 6]})
    assert %{results: [%{finish_reason: :length, token_ids: [_, _, _, _]}]} = result
    long = %{token_ids: List.duplicate(1, 11)}
    assert {:error, %Error{reason: :prompt_too_long}} = Serving.run(serving, long)
  end

  @tag :tmp_dir
  test "the tokenizer's own end of text counts too", %{tmp_dir: dir} do
    folder = Fixtures.copy(Application.app_dir(:bombus, "priv/models/demo"), dir)
    File.rm!(Path.join(folder, "generation_config.json"))
    Fixtures.edit_json(folder, "config.json", &Map.put(&1, "eos_token_id", 0))
    serving = Serving.new(Bombus.load_model!(folder), Bombus.load_tokenizer!(folder))
    result = Serving.run(serving, %{text: "Write a post about tea", max_new_tokens: 120})
    assert %{results: [%{finish_reason: :stop}]} = result
  end

  test "a list of inputs answers as each alone", %{serving: serving} do
    inputs = [
      "Write a post about coffee",
      %{text: "Write a post about bees", temperature: 0.8, seed: 7},
      %{messages: [%{role: "user", content: "Write a post about rain"}]},
      %{text: "Tea is", chat_template: false, max_new_tokens: 8}
    ]

    assert run(serving, inputs) == Enum.map(inputs, &run(serving, &1))
  end

  test "a string is a user's message, and completed where there is no template", context do
    said = run(context.serving, "Write a post about tea")
    messages = %{messages: [%{"role" => "user", "content" => "Write a post about tea"}]}
    assert run(context.serving, messages) == said

    bare = Serving.new(context.model, %{context.tokenizer | chat_template?: false})
    completed = run(context.serving, %{text: "Tea is", chat_template: false})
    assert run(bare, "Tea is") == completed
    assert completed != run(context.serving, "Tea is")
  end

  test "token ids go in and come out", %{model: model, serving: serving} do
    %{results: [%{token_summary: %{input: input}}]} =
      Serving.run(serving, "Write a post about tea")

    bare = Serving.new(model, nil, max_new_tokens: 5)
    result = Serving.run(bare, %{token_ids: [10, 20, 30]})
    assert %{results: [%{text: nil, token_ids: ids, token_summary: %{input: 3}}]} = result
    assert bare |> Serving.stream(%{token_ids: [10, 20, 30]}) |> Enum.to_list() == ids
    assert input > 3
  end

  test "a seed repeats, alone and in a crowd; others differ", %{serving: serving} do
    input = fn seed ->
      %{text: "Write a post about cats", temperature: 0.8, seed: seed, max_new_tokens: 30}
    end

    alone = run(serving, input.(5))
    assert run(serving, input.(5)) == alone
    crowd = run(serving, Enum.map(0..7, input))
    assert Enum.at(crowd, 5) == alone
    assert crowd |> Enum.map(&text/1) |> Enum.uniq() |> length() >= 3
  end

  test "without a seed, samples differ", %{serving: serving} do
    inputs = List.duplicate(%{text: "Write a post", temperature: 1.0, max_new_tokens: 12}, 6)
    texts = serving |> Serving.run(inputs) |> Enum.map(&text/1)
    assert texts |> Enum.uniq() |> length() > 1
  end

  test "a stop string ends the text, also where it spans tokens", %{serving: serving} do
    prompt = "Write a post about coffee"
    whole = text(Serving.run(serving, prompt))
    pieces = serving |> Serving.stream(prompt) |> Enum.to_list()
    # From inside one piece into the next.
    [first, second, third | _rest] = Enum.drop(pieces, 4)
    spanning = String.slice(first, -1, 1) <> second <> String.first(third)
    [expected, _after] = String.split(whole, spanning, parts: 2)

    input = %{text: prompt, stop: ["never there", spanning]}
    %{results: [result]} = Serving.run(serving, input)
    assert result.text == expected
    assert result.finish_reason == :stop
    assert serving |> Serving.stream(input) |> Enum.join() == expected
  end

  test "a text that ends in the beginning of a stop string is whole", %{serving: serving} do
    prompt = "Write a post about coffee"
    whole = text(Serving.run(serving, prompt))
    input = %{text: prompt, stop: String.slice(whole, -4, 4) <> " and more"}
    assert text(Serving.run(serving, input)) == whole
  end

  test "a repetition penalty changes what is repeated" do
    {serving, input} = endless()
    plain = ids(Serving.run(serving, Map.put(input, :max_new_tokens, 60)))
    penalized = Map.merge(input, %{max_new_tokens: 60, repetition_penalty: 5.0})
    ids = ids(Serving.run(serving, penalized))
    assert length(Enum.uniq(ids)) > length(Enum.uniq(plain))
    assert Serving.run(serving, [input, penalized]) |> List.last() |> ids() == ids
  end

  test "adapters are per request, and mixed in one batch", %{serving: serving} do
    prompt = "Write a post about coffee"
    pirate = Bombus.load_adapter!({:demo, "pirate"})
    news = Bombus.load_adapter!({:demo, "news"})

    inputs =
      for adapter <- [pirate, nil, news, pirate] do
        %{text: prompt, adapter: adapter, max_new_tokens: 25}
      end

    alone = Enum.map(inputs, &run(serving, &1))
    assert run(serving, inputs) == alone
    assert alone |> Enum.map(&text/1) |> Enum.uniq() |> length() == 3
  end

  test "an adapter's memory comes back with it" do
    {serving, input} = endless()
    # On a process of its own, so that nothing holds the adapter afterwards.
    use_adapter = fn ->
      adapter = Bombus.load_adapter!(Fixtures.adapter("f32-untied", "all-layers"))
      Serving.run(serving, Map.merge(input, %{adapter: adapter, max_new_tokens: 2}))
    end

    before = Bombus.memory_info().adapters
    use_adapter |> Task.async() |> Task.await()
    assert_soon(fn -> Bombus.memory_info().adapters == before end)
  end

  test "adapters come and go while others generate, and their memory comes back" do
    {serving, input} = endless()
    load = &Bombus.load_adapter!(Fixtures.adapter("f32-untied", &1))
    control = Map.merge(input, %{adapter: load.("all-layers"), max_new_tokens: 300})
    alone = ids(Serving.run(serving, control))
    assert_soon(&free?/0)
    before = Bombus.memory_info()

    running = Task.async(fn -> ids(Serving.run(serving, control)) end)

    visits =
      for name <- ~w(last-qv head dora-head all-layers last-qv dora-head), seed <- 1..3 do
        Task.async(fn ->
          visit = Map.merge(input, %{adapter: load.(name), max_new_tokens: 4, seed: seed})
          {name, ids(Serving.run(serving, visit))}
        end)
      end

    answers = Task.await_many(visits)
    assert Task.await(running) == alone
    # Each name's answers agree, and the adapters differ.
    assert answers |> Enum.uniq() |> length() == 4
    assert answers |> Enum.uniq_by(&elem(&1, 1)) |> length() > 1

    assert_soon(fn ->
      now = Bombus.memory_info()
      free?(now) and now.adapters == before.adapters and now.active == before.active
    end)

    # Also holds on to the model and the first adapter until here.
    assert ids(Serving.run(serving, control)) == alone
  end

  describe "a sequence is freed" do
    test "when its stream is halted" do
      {serving, input} = endless()
      assert [_, _, _] = serving |> Serving.stream(input) |> Enum.take(3)
      # Halting waits for the engine's answer.
      assert free?()
      assert Process.info(self(), :messages) == {:messages, []}
    end

    test "when its stream raises" do
      {serving, input} = endless()
      stream = Serving.stream(serving, input)
      assert_raise RuntimeError, fn -> Enum.each(stream, fn _id -> raise "enough" end) end
      assert free?()
    end

    test "when its caller dies in mid-stream" do
      {serving, input} = endless()
      test = self()
      pid = spawn(fn -> serving |> Serving.stream(input) |> Enum.each(&send(test, &1)) end)
      assert_receive id when is_integer(id)
      Process.exit(pid, :kill)
      assert_soon(&free?/0)
    end

    test "when its caller dies in prefill, of a request and of a score" do
      {%{model: model} = serving, _input} = endless(prefill_chunk: 1)
      ids = List.duplicate(7, 400)

      for run <- [
            fn -> Serving.run(serving, %{token_ids: ids}) end,
            fn -> Bombus.score(model, ids) end
          ] do
        # Again and again: one may be over before it is seen.
        pid = spawn(fn -> Enum.each(1..1000, fn _again -> run.() end) end)
        assert_soon(fn -> Bombus.memory_info().sequences == 1 end)
        Process.exit(pid, :kill)
        assert_soon(&free?/0)
      end
    end

    test "when its caller dies in the queue" do
      {serving, input} = endless(max_batch_size: 1)
      again = fn -> Enum.each(1..1000, fn _again -> Serving.run(serving, input) end) end
      callers = for _ <- 1..3, do: spawn(again)
      assert_soon(fn -> Bombus.memory_info().sequences == 3 end)
      Enum.each(callers, &Process.exit(&1, :kill))
      assert_soon(&free?/0)
    end
  end

  test "a full queue answers at once" do
    {serving, input} = endless(max_batch_size: 1, max_queue: 2)
    tasks = for _ <- 1..8, do: Task.async(fn -> Serving.run(serving, input) end)
    results = Task.await_many(tasks, 60_000)
    {refused, answered} = Enum.split_with(results, &match?({:error, _}, &1))
    assert [{:error, %Error{reason: :overloaded}} | _] = refused
    assert [first | _] = answered
    assert Enum.all?(answered, &(ids(&1) == ids(first)))
    assert %{results: [_one]} = Serving.run(serving, input)
  end

  test "a list longer than the queue is answered, in its order" do
    for options <- [[max_batch_size: 1, max_queue: 1], [max_batch_size: 2, max_queue: 1]] do
      {serving, input} = endless(options)
      inputs = for n <- 1..9, do: %{input | token_ids: [n, n + 1]} |> Map.put(:max_new_tokens, n)
      alone = Enum.map(inputs, &run(serving, &1))
      assert run(serving, inputs) == alone
      assert Enum.map(alone, &length(ids(&1))) == Enum.to_list(1..9)
      # The errors of some are theirs.
      long = %{token_ids: List.duplicate(1, 600)}

      assert [first, {:error, %Error{reason: :prompt_too_long}}, last] =
               run(serving, [hd(inputs), long, List.last(inputs)])

      assert [first, last] == [hd(alone), List.last(alone)]
    end

    assert Serving.run(elem(endless(), 0), []) == []
    assert free?()
  end

  test "many processes generate at once", %{serving: serving} do
    serving = %{serving | options: %{serving.options | max_new_tokens: 20}}
    prompts = for topic <- ~w(coffee tea rain cats), do: "Write a post about #{topic}"
    expected = Map.new(prompts, &{&1, run(serving, &1)})

    1..12
    |> Task.async_stream(
      fn index ->
        prompt = Enum.at(prompts, rem(index, 4))
        {prompt, run(serving, prompt)}
      end,
      max_concurrency: 12,
      timeout: 120_000
    )
    |> Enum.each(fn {:ok, {prompt, result}} -> assert result == expected[prompt] end)
  end

  describe "in a supervision tree" do
    test "it is called by its name", %{serving: serving} do
      start_supervised!({Serving, serving: serving, name: MyLLM})
      prompt = "Write a post about tea"
      assert Fixtures.plain(Serving.batched_run(MyLLM, prompt)) == run(serving, prompt)
      short = %{text: prompt, max_new_tokens: 8}
      assert Fixtures.plain(Serving.batched_run(MyLLM, [short])) == [run(serving, short)]
      pieces = MyLLM |> Serving.stream(short) |> Enum.to_list()
      assert Enum.join(pieces) == text(Serving.run(serving, short))
    end

    test "its requests end when it stops" do
      {serving, input} = endless()
      start_supervised!({Serving, serving: serving, name: Stopping})
      tasks = for _ <- 1..3, do: Task.async(fn -> until_stopped(Stopping, input) end)
      assert_soon(fn -> Bombus.memory_info().sequences == 3 end)
      stop_supervised!(Stopping)
      ends = Task.await_many(tasks)
      assert :stopped in ends and Enum.all?(ends, &(&1 in [:stopped, :not_running]))
      assert_soon(&free?/0)
      assert {:error, %Error{reason: :not_running}} = Serving.batched_run(Stopping, input)
    end

    # Again and again: one may be over before it is seen.
    defp until_stopped(name, input) do
      case Serving.batched_run(name, input) do
        {:error, %Error{reason: reason}} -> reason
        %{results: [_]} -> until_stopped(name, input)
      end
    end

    test "several live side by side, and come back after a crash", context do
      {other, input} = endless()
      start_supervised!({Serving, serving: context.serving, name: One})
      start_supervised!({Serving, serving: other, name: Two})
      assert %{results: [_]} = Serving.batched_run(One, "Write a post about tea")
      killed = Process.whereis(Two)
      Process.exit(killed, :kill)
      assert_soon(fn -> Process.whereis(Two) not in [nil, killed] end)
      assert %{results: [_]} = Serving.batched_run(Two, input)
    end

    test "its child specification says what is missing", %{serving: serving} do
      assert_raise ArgumentError, ~r/:name/, fn -> Serving.child_spec(serving: serving) end
      assert_raise ArgumentError, ~r/:serving/, fn -> Serving.child_spec(name: X) end
      options = [serving: serving, name: X]

      for {wrong, words} <- [
            {[nmae: X, serving: serving], ":name"},
            {[mdoel: :demo] ++ options, "unknown option :mdoel, did you mean :model"},
            {[model: :demo] ++ options, "both"},
            {[temperature: 1] ++ options, "unknown option :temperature"},
            {[serving: :demo, name: X], "made by"},
            {[drain: -1] ++ options, ":drain"},
            {[model: serving.model, name: X], ":tokenizer"},
            {[model: serving.model, tokenizer: nil, device: :cpu, name: X],
             "unknown option :device"}
          ] do
        assert_raise ArgumentError, Regex.compile!(words), fn -> Serving.child_spec(wrong) end
      end

      assert_raise ArgumentError, ~r/keyword list/, fn -> Serving.child_spec(serving) end
    end
  end
end
