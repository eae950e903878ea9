defmodule Bombus.ServingCallsTest do
  # Servings that are not there, and requests that are cancelled.
  use ExUnit.Case

  import Bombus.Fixtures, only: [assert_soon: 1]

  alias Bombus.{Error, Fixtures, Serving}

  @endless Fixtures.checkpoint("f32-untied")
  @input %{token_ids: [3, 1, 4, 1, 5], max_new_tokens: 400}

  defp entry(%{results: [entry]}), do: entry

  describe "a serving that is not there" do
    test "is an error, however it is named" do
      start_supervised!({Registry, keys: :unique, name: Names})
      dead = spawn(fn -> :ok end)
      assert_soon(fn -> not Process.alive?(dead) end)

      for name <- [
            Nobody,
            {Nobody, node()},
            {:global, Nobody},
            {:via, Registry, {Names, :nobody}},
            {:via, Registry, {NoRegistry, :nobody}},
            dead
          ] do
        assert_not_there(name, :not_running)
      end
    end

    test "nor is its node" do
      assert_not_there({Nobody, :"nobody@127.0.0.1"}, :no_connection)
    end

    defp assert_not_there(name, reason) do
      assert {:error, %Error{reason: ^reason} = error} = Serving.batched_run(name, "x")
      assert Serving.batched_run(name, ["x", "y"]) == [{:error, error}, {:error, error}]
      assert %Error{reason: ^reason} = catch_error(Serving.stream(name, "x"))
      assert {:error, %Error{reason: ^reason}} = Serving.status(name)
      assert {:error, %Error{reason: ^reason}} = Serving.await_ready(name, 10)
    end

    test "but another process, which lives on" do
      {:ok, agent} = Agent.start_link(fn -> :state end, name: NoServing)
      for name <- [NoServing, agent], do: assert_not_there(name, :not_running)
      assert Agent.get(NoServing, & &1) == :state
      assert Process.info(self(), :messages) == {:messages, []}
    end

    test "a name that is none is the caller's mistake" do
      for name <- ["llm", nil, 1, {"llm", node()}] do
        assert_raise ArgumentError, ~r/name of a serving/, fn ->
          Serving.batched_run(name, "x")
        end

        assert_raise ArgumentError, ~r/name of a serving/, fn -> Serving.stream(name, "x") end
        assert_raise ArgumentError, ~r/name of a serving/, fn -> Serving.status(name) end
      end
    end

    test "where it is there, every name works" do
      start_supervised!({Registry, keys: :unique, name: Names})
      names = [Here, {:global, Here}, {:via, Registry, {Names, :here}}]
      model = Bombus.load_model!(@endless)

      for name <- names do
        server = start_supervised!({Serving, name: name, model: model, tokenizer: nil})

        for name <- [name, server], input = %{@input | max_new_tokens: 2} do
          assert length(entry(Serving.batched_run(name, input)).token_ids) == 2
          assert length(Enum.to_list(Serving.stream(name, input))) == 2
          assert %{state: :ready} = Serving.status(name)
        end
      end
    end

    test "a call that is no request leaves the serving alone" do
      server = start_supervised!({Serving, name: Asked, model: @endless, tokenizer: nil})
      assert {:error, %Error{}} = GenServer.call(server, :what?)
      GenServer.cast(server, :what?)
      send(server, :what?)
      assert Serving.await_ready(server) == :ok
      assert Process.whereis(Asked) == server
    end
  end

  describe "timeout" do
    setup do
      model = Bombus.load_model!(@endless, max_batch_size: 1)
      %{serving: Serving.new(model, nil), free?: fn -> Bombus.memory_info().sequences == 0 end}
    end

    defp reason({:error, %Error{reason: reason}}), do: reason
    defp reason(%{results: [%{finish_reason: reason}]}), do: reason

    test "ends a request in the queue and where it runs", %{serving: serving, free?: free?} do
      hold = Task.async(fn -> Serving.run(serving, List.duplicate(@input, 100)) end)
      assert_soon(fn -> Bombus.memory_info().sequences > 0 end)
      soon = Map.put(@input, :timeout, 1)
      assert reason(Serving.run(serving, soon)) == :timeout
      assert reason(Serving.run(serving, %{soon | timeout: 0})) == :timeout
      Serving.cancel(hold)
      Task.await(hold)
      for _ <- 1..5, do: assert(reason(Serving.run(serving, soon)) == :timeout)
      assert free?.()

      for timeout <- [nil, :infinity, 60_000] do
        assert reason(Serving.run(serving, %{soon | timeout: timeout})) == :length
      end
    end

    test "is each input's own in a list, and a serving's own default", %{serving: serving} do
      short = %{@input | max_new_tokens: 3}
      list = [short, Map.put(@input, :timeout, 1), short]
      assert Enum.map(Serving.run(serving, list), &reason/1) == [:length, :timeout, :length]
      hurried = Serving.new(serving.model, nil, timeout: 1)
      assert reason(Serving.run(hurried, @input)) == :timeout
      assert reason(Serving.run(hurried, Map.put(short, :timeout, :infinity))) == :length
      start_supervised!({Serving, name: Hurried, serving: hurried})
      assert reason(Serving.batched_run(Hurried, @input)) == :timeout
      assert reason(Serving.batched_run(Hurried, Map.put(short, "timeout", 60_000))) == :length
    end

    test "is raised by a stream, after what came in time", %{serving: serving, free?: free?} do
      whole = entry(Serving.run(serving, @input)).token_ids
      test = self()

      # Its reader stops until the time is over.
      read = fn id ->
        send(test, {:read, id})
        unless free?.(), do: assert_soon(free?)
      end

      stream = Serving.stream(serving, Map.put(@input, :timeout, 300))
      assert %Error{reason: :timeout} = catch_error(Enum.each(stream, read))
      {:messages, messages} = Process.info(self(), :messages)
      ids = for {:read, id} <- messages, do: id
      assert ids != [] and List.starts_with?(whole, ids) and length(ids) < 400
      assert length(messages) == length(ids)
    end

    test "is a whole number of milliseconds", %{serving: serving} do
      for wrong <- [-1, 1.5, "1", :never, 0x1_0000_0000] do
        assert_raise ArgumentError, ~r/:timeout/, fn ->
          Serving.run(serving, Map.put(@input, :timeout, wrong))
        end
      end
    end
  end

  test "a reader that stops holds nobody up, and loses nothing" do
    serving = Serving.new(Bombus.load_model!(@endless, max_batch_size: 1), nil)
    whole = Serving.run(serving, @input)
    test = self()

    read = fn id ->
      send(test, {:read, self()})
      receive(do: (:go -> id))
    end

    task = Task.async(fn -> serving |> Serving.stream(@input) |> Enum.map(read) end)
    assert_receive {:read, pid}, 10_000
    # Others have its place, again and again.
    for _ <- 1..3,
        do: assert(Fixtures.plain(Serving.run(serving, @input)) == Fixtures.plain(whole))

    {:message_queue_len, waiting} = Process.info(pid, :message_queue_len)
    assert waiting in 1..100
    for _ <- 1..400, do: send(pid, :go)
    assert Task.await(task) == entry(whole).token_ids
  end

  describe "cancel" do
    setup do
      model = Bombus.load_model!(@endless, max_batch_size: 2)
      %{serving: Serving.new(model, nil), free?: fn -> Bombus.memory_info().sequences == 0 end}
    end

    # A task that has read so far, and waits. Then its sequence does.
    defp streaming(serving, input) do
      test = self()

      read = fn id ->
        send(test, {:read, self(), id})
        receive(do: (:go -> id))
      end

      task = Task.async(fn -> serving |> Serving.stream(input) |> Enum.map(read) end)
      pid = task.pid
      assert_receive {:read, ^pid, _id}, 10_000
      task
    end

    # It reads the rest.
    defp rest(task) do
      for _ <- 1..500, do: send(task.pid, :go)
      Task.await(task)
    end

    test "ends a stream where it is", %{serving: serving, free?: free?} do
      whole = entry(Serving.run(serving, @input)).token_ids
      task = streaming(serving, @input)
      assert Serving.cancel(task) == :ok
      read = rest(task)
      assert List.starts_with?(whole, read)
      assert free?.()

      task = streaming(serving, Map.put(@input, :stream_done, true))
      Serving.cancel(task.pid)
      assert {:done, result} = List.last(rest(task))
      assert entry(result).finish_reason == :cancelled
    end

    test "gives what a run has so far", %{serving: serving, free?: free?} do
      whole = entry(Serving.run(serving, @input)).token_ids
      assert %{finish_reason: :cancelled, token_ids: ids} = entry(cancelled(serving))
      assert List.starts_with?(whole, ids) and length(ids) < 400
      assert free?.()
    end

    # Again and again: one may be over before it is seen.
    defp cancelled(serving) do
      task = Task.async(fn -> Serving.run(serving, @input) end)
      assert_soon(fn -> Bombus.memory_info().sequences == 1 or not Process.alive?(task.pid) end)
      Serving.cancel(task)
      result = Task.await(task)
      if entry(result).finish_reason == :cancelled, do: result, else: cancelled(serving)
    end

    test "ends all of a list", %{serving: serving, free?: free?} do
      inputs = List.duplicate(@input, 50)
      task = Task.async(fn -> Serving.run(serving, inputs) end)
      assert_soon(fn -> Bombus.memory_info().sequences == 4 end)
      Serving.cancel(task)
      results = Task.await(task)
      assert length(results) == 50
      assert Enum.all?(results, &(entry(&1).finish_reason == :cancelled))
      assert free?.()
    end

    test "leaves others alone", %{serving: serving} do
      input = %{@input | max_new_tokens: 40}
      task = Task.async(fn -> Serving.run(serving, input) end)
      Serving.cancel(self())
      Serving.cancel(spawn(fn -> :ok end))
      assert entry(Task.await(task)).finish_reason == :length
      # Nor what the process asks for afterwards.
      assert entry(Serving.run(serving, input)).finish_reason == :length

      for wrong <- [nil, MyLLM, "x"],
          do: assert_raise(ArgumentError, fn -> Serving.cancel(wrong) end)
    end

    test "what a process leaves behind is forgotten with it", %{serving: serving, free?: free?} do
      test = self()

      pid =
        spawn(fn -> serving |> Serving.stream(@input) |> Enum.each(&send(test, {:read, &1})) end)

      assert_receive {:read, _id}, 10_000
      assert :ets.member(Serving.Requests, pid)
      Process.exit(pid, :kill)
      assert_soon(fn -> not :ets.member(Serving.Requests, pid) end)
      assert_soon(free?)
      Serving.run(serving, %{@input | max_new_tokens: 1})
      refute :ets.member(Serving.Requests, self())
    end

    test "a stream that nobody goes on with ends with its last reference", context do
      %{serving: serving, free?: free?} = context

      read = fn ->
        Enumerable.reduce(Serving.stream(serving, @input), {:cont, nil}, fn id, _acc ->
          {:suspend, id}
        end)
      end

      assert {:suspended, _id, _continue} = read.()
      :erlang.garbage_collect()
      assert_soon(free?)
    end
  end
end
