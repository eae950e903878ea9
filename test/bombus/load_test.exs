defmodule Bombus.LoadTest do
  # What an application with many visitors needs: limits, what is kept for the next, options that
  # look at what was generated, faults.
  use ExUnit.Case

  import Bombus.Fixtures, only: [assert_soon: 1]

  alias Bombus.{Error, Fixtures, Native, Serving}

  # Does not end by itself.
  defp endless(options \\ []) do
    Serving.new(Bombus.load_model!(Fixtures.checkpoint("f32-untied"), options), nil)
  end

  defp demo(options) do
    Serving.new(Bombus.load_model!(:demo), Bombus.load_tokenizer!(:demo), options)
  end

  defp result(serving, input) do
    %{results: [result]} = Serving.run(serving, input)
    result
  end

  # As of so many callers: those of a list would wait for each other.
  defp at_once(serving, input, count) do
    {:ok, input} = Serving.Input.normalize!(input, serving)
    started = for _ <- 1..count, do: Serving.Request.start(serving, input, nil)

    for started <- started,
        do: with({:ok, request} <- started, do: Serving.Request.collect(request))
  end

  describe "the prefix cache" do
    test "a conversation's next turn computes what is new" do
      serving = demo(max_new_tokens: 60)
      first = %{role: "user", content: "Write a post about coffee"}
      answer = result(serving, %{messages: [first]})
      assert answer.token_summary.cached == 0
      said = %{role: "assistant", content: answer.text}
      next = [first, said, %{role: "user", content: "Write a post about tea"}]

      assert %{token_summary: %{input: input, cached: cached}} =
               result(serving, %{messages: next})

      assert cached >= answer.token_summary.input + answer.token_summary.output
      assert cached < input
      # What comes out is what comes out of nothing.
      fresh =
        Serving.new(Bombus.load_model!(:demo, prefix_cache: 0), serving.tokenizer,
          max_new_tokens: 60
        )

      assert result(fresh, %{messages: next}).text == result(serving, %{messages: next}).text
      assert result(fresh, %{messages: next}).token_summary.cached == 0
    end

    test "adapters have their own" do
      serving = demo(max_new_tokens: 5)
      pirate = Bombus.load_adapter!({:demo, "pirate"})
      again = Bombus.load_adapter!({:demo, "pirate"})
      text = "Write a post about coffee"

      cached =
        for adapter <- [nil, pirate, nil, pirate, again] do
          result(serving, %{text: text, adapter: adapter}).token_summary.cached
        end

      assert [0, 0, known, known, 0] = cached
      assert known > 0
    end

    test "its memory is cached, not active, and goes with the model" do
      before = Bombus.memory_info()

      Task.await(
        Task.async(fn ->
          serving = endless()
          result(serving, %{token_ids: Enum.to_list(1..200), max_new_tokens: 2})
          loaded = Bombus.memory_info()
          result(serving, %{token_ids: Enum.to_list(51..250), max_new_tokens: 2})
          more = Bombus.memory_info()
          assert more.active == loaded.active
          assert more.cached > loaded.cached
          assert more.kv == 0 and more.sequences == 0
        end)
      )

      # Other tests' models may still go, too.
      assert_soon(fn -> Bombus.memory_info().models <= before.models end)
      assert_soon(fn -> Bombus.memory_info().active <= before.active end)
    end
  end

  describe "limits" do
    test "of the model's context" do
      serving = endless(max_context: 20)
      assert serving.model.spec.context == 20

      assert %{finish_reason: :length, token_ids: ids} =
               result(serving, %{token_ids: Enum.to_list(1..15)})

      assert length(ids) == 5
      long = %{token_ids: Enum.to_list(1..21)}
      assert {:error, %Error{reason: :prompt_too_long}} = Serving.run(serving, long)
      narrower = %{token_ids: Enum.to_list(1..15), max_context: 17}
      assert length(result(serving, narrower).token_ids) == 2
      narrow = Serving.new(serving.model, nil, max_context: 16)
      assert length(result(narrow, %{token_ids: Enum.to_list(1..15)}).token_ids) == 1
    end

    test "of a serving, within the model's" do
      wide = endless()
      narrow = Serving.new(wide.model, nil, max_batch_size: 1, max_queue: 2)
      input = %{token_ids: [3, 1, 4, 1, 5], max_new_tokens: 300}
      {refused, answered} = Enum.split_with(at_once(narrow, input, 8), &match?({:error, _}, &1))
      assert [{:error, %Error{reason: :overloaded}} | _] = refused
      # One that runs, and two that wait.
      assert length(answered) == 3
      # The others of the model are not concerned.
      running = for _ <- 1..3, do: Task.async(fn -> Serving.run(narrow, input) end)
      assert_soon(fn -> Bombus.memory_info().sequences >= 2 end)
      assert %{results: [_]} = Serving.run(wide, %{input | max_new_tokens: 3})
      Task.await_many(running, 60_000)
    end

    test "let in as many as run and wait, also all at once" do
      serving = endless(max_batch_size: 4, max_queue: 2)
      input = %{token_ids: [3, 1, 4, 1, 5], max_new_tokens: 300}

      {refused, answered} = Enum.split_with(at_once(serving, input, 9), &match?({:error, _}, &1))
      assert {length(refused), length(answered)} == {3, 6}
    end

    test "are whole numbers above 0" do
      for {key, value} <- [max_batch_size: 0, max_queue: -1, prefill_chunk: 1.5, max_context: 0] do
        assert_raise ArgumentError, ~r/#{inspect(key)}/, fn -> endless([{key, value}]) end
        model = Bombus.load_model!(Fixtures.checkpoint("f32-untied"))

        assert_raise ArgumentError, ~r/#{inspect(key)}/, fn ->
          Serving.new(model, nil, [{key, value}])
        end
      end

      assert_raise ArgumentError, ~r/:prefix_cache/, fn -> endless(prefix_cache: -1) end
    end
  end

  describe "options" do
    test "log-probabilities are those that the text scores" do
      serving = demo(max_new_tokens: 12)
      prompt = [5, 6, 7, 8]
      result = result(serving, %{token_ids: prompt, logprobs: 3, temperature: 0.9, seed: 1})
      {:ok, scores} = Bombus.score(serving.model, prompt ++ result.token_ids)
      assert Enum.map(result.logprobs, & &1.token_id) == result.token_ids

      for {entry, score} <- Enum.zip(result.logprobs, Enum.drop(scores, 3)) do
        assert_in_delta entry.logprob, score, 1.0e-2
        assert [%{token_id: _, logprob: first}, %{logprob: second}, %{logprob: third}] = entry.top
        assert first >= second and second >= third and first >= entry.logprob
      end

      assert [%{top: []} | _] = result(serving, %{token_ids: prompt, logprobs: 0}).logprobs
      refute Map.has_key?(result(serving, %{token_ids: prompt}), :logprobs)
      streamed = Serving.stream(serving, %{token_ids: prompt, logprobs: 1, stream_done: true})

      assert {:done, %{results: [%{logprobs: [_ | _]}]}} =
               streamed |> Enum.to_list() |> List.last()
    end

    test "penalties and biases" do
      serving = endless()
      input = %{token_ids: [3, 1, 4, 1, 5], max_new_tokens: 50}

      distinct = fn options ->
        serving
        |> result(Map.merge(input, options))
        |> Map.fetch!(:token_ids)
        |> Enum.uniq()
        |> length()
      end

      assert distinct.(%{}) < 50
      assert distinct.(%{presence_penalty: 1000}) == 50
      assert distinct.(%{frequency_penalty: 1000.0}) == 50

      assert result(serving, Map.put(input, :logit_bias, %{9 => 1.0e6})).token_ids ==
               List.duplicate(9, 50)

      assert result(serving, Map.put(input, :logit_bias, [{9, 1.0e6}])).token_ids ==
               List.duplicate(9, 50)

      outside = Map.put(input, :logit_bias, %{999_999 => 1})
      assert_raise ArgumentError, ~r/token ids/, fn -> Serving.run(serving, outside) end

      assert_raise ArgumentError, ~r/:stop/, fn ->
        Serving.run(serving, Map.put(input, :stop, "a"))
      end
    end

    test "a text does not end before it may" do
      serving = demo(max_new_tokens: 200)
      usual = result(serving, "Write a post about tea")
      longer = result(serving, %{text: "Write a post about tea", min_new_tokens: 100})
      assert length(longer.token_ids) >= 100
      assert String.starts_with?(longer.text, usual.text)
    end
  end

  describe "a fault in a step" do
    defp until_error(serving, input) do
      Enum.each(Serving.stream(serving, input), fn _id -> :ok end)
      until_error(serving, input)
    rescue
      error in Error -> error
    end

    # Again and again, until it has met all of them.
    defp break(serving, fault, tasks) do
      if Enum.any?(tasks, &Process.alive?(&1.pid)) do
        Native.fail_next_step(serving.model.ref, fault)
        Process.sleep(5)
        break(serving, fault, tasks)
      end
    end

    test "fails who was in it, and the engine serves on" do
      serving = endless()
      input = %{token_ids: [3, 1, 4, 1, 5], max_new_tokens: 400}
      expected = result(serving, %{input | max_new_tokens: 20}).token_ids

      for {fault, reason} <- [panic: :panic, error: :backend] do
        tasks = for _ <- 1..3, do: Task.async(fn -> until_error(serving, input) end)
        break(serving, fault, tasks)
        assert Enum.map(tasks, &Task.await(&1).reason) == [reason, reason, reason]
        # The last fault may have come when nobody asked any more: it is the next one's.
        Serving.run(serving, %{input | max_new_tokens: 1})
        assert result(serving, %{input | max_new_tokens: 20}).token_ids == expected
        assert %{sequences: 0, kv: 0} = Bombus.memory_info()
      end
    end
  end
end
