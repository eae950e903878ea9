defmodule Bombus.ClusterTest do
  # A serving on another node, which may go away.
  use ExUnit.Case

  import Bombus.Fixtures, only: [assert_soon: 1]

  alias Bombus.{Error, Fixtures, Serving}

  @endless Fixtures.checkpoint("f32-untied")
  @input %{token_ids: [3, 1, 4, 1, 5], max_new_tokens: 400}

  setup do
    Process.flag(:trap_exit, true)
    {_peer, node} = Fixtures.start_peer(:code.get_path())
    {:ok, _} = :erpc.call(node, Application, :ensure_all_started, [:elixir])
    :ok = :erpc.call(node, Fixtures, :serve, [[name: There, model: @endless, tokenizer: nil]])
    system_pid = :erpc.call(node, System, :pid, [])

    on_exit(fn ->
      signal(system_pid, "KILL")
      Node.stop()
    end)

    %{node: node, there: {There, node}, system_pid: system_pid}
  end

  defp signal(system_pid, name),
    do: System.cmd("kill", ["-#{name}", system_pid], stderr_to_stdout: true)

  # Who is in the midst of a request: a run, a list, and a stream that waits for `:go` after each chunk.
  defp callers(there) do
    test = self()

    read = fn id ->
      send(test, {:read, id})
      receive(do: (:go -> :ok))
    end

    tasks = [
      Task.async(fn -> until_error(there, @input) end),
      Task.async(fn -> until_error(there, List.duplicate(@input, 70)) end),
      Task.async(fn -> catch_error(there |> Serving.stream(@input) |> Enum.each(read)) end)
    ]

    assert_receive {:read, _id}, 20_000
    assert_soon(fn -> Serving.status(there).batch > 1 end)
    tasks
  end

  defp until_error(there, input) do
    answers = List.wrap(Serving.batched_run(there, input))

    case for {:error, error} <- answers, do: error do
      [error | _] -> error
      [] -> until_error(there, input)
    end
  end

  defp reasons(tasks) do
    for task <- tasks, _ <- 1..400, do: send(task.pid, :go)
    Enum.map(Task.await_many(tasks, 20_000), & &1.reason)
  end

  describe "callers end" do
    test "when the node is killed", %{there: there, system_pid: system_pid} do
      tasks = callers(there)
      signal(system_pid, "KILL")
      assert reasons(tasks) == [:no_connection, :no_connection, :no_connection]
      assert {:error, %Error{reason: :no_connection}} = Serving.batched_run(there, @input)
      assert {:error, %Error{reason: :no_connection}} = Serving.status(there)
    end

    test "when the node is disconnected", %{there: there, node: node} do
      tasks = callers(there)
      :erlang.disconnect_node(node)
      assert reasons(tasks) == [:no_connection, :no_connection, :no_connection]
    end

    test "when the serving dies", %{there: there} do
      tasks = callers(there)
      server = :erpc.call(elem(there, 1), Process, :whereis, [There])
      Process.exit(server, :kill)
      assert Enum.all?(reasons(tasks), &(&1 in [:stopped, :not_running]))
      # Its supervisor has another.
      assert_soon(fn -> Serving.await_ready(there) == :ok end)
    end

    test "when their time is over, though the node says nothing", context do
      %{there: there, system_pid: system_pid} = context
      stream = Serving.stream(there, Map.put(@input, :timeout, 400))
      signal(system_pid, "STOP")
      assert %Error{reason: :timeout} = catch_error(Enum.to_list(stream))
      soon = Map.put(@input, :timeout, 100)
      assert {:error, %Error{reason: :timeout}} = Serving.batched_run(there, soon)
      signal(system_pid, "CONT")
      assert_soon(fn -> match?(%{results: [_]}, Serving.batched_run(there, @input)) end)
      # What comes late does not come.
      {:messages, messages} = Process.info(self(), :messages)
      assert Enum.reject(messages, &match?({:EXIT, _port, _reason}, &1)) == []
    end
  end

  test "another version of Bombus there is an error, not a wait", %{there: there, node: node} do
    for module <- [Serving.Remote, Serving.Client] do
      {:ok, module, binary} = :compile.forms([{:attribute, 1, :module, module}])
      {:module, _} = :erpc.call(node, :code, :load_binary, [module, ~c"old", binary])
      assert {:error, %Error{reason: :unsupported} = error} = Serving.batched_run(there, @input)
      assert error.message =~ "version"

      assert %Error{reason: :unsupported} =
               catch_error(Enum.to_list(Serving.stream(there, @input)))
    end
  end

  test "a fault there is an error here", %{there: there, node: node} do
    # An adapter of a model's node that this node has made up.
    adapter = %Bombus.Adapter{ref: make_ref(), rank: 1, scale: 1.0}
    input = Map.put(@input, :adapter, adapter)
    assert_raise ArgumentError, ~r/node/, fn -> Serving.batched_run(there, input) end
    foreign = %{adapter | ref: :erpc.call(node, :erlang, :make_ref, [])}
    input = %{input | adapter: foreign}
    assert {:error, %Error{reason: :bad_request}} = Serving.batched_run(there, input)
    assert [{:error, _}, %{results: [_]}] = Serving.batched_run(there, [input, @input])
  end

  test "a reader here that stops is not sent more than its window", %{there: there} do
    test = self()

    read = fn id ->
      send(test, {:read, self()})
      receive(do: (:go -> id))
    end

    task = Task.async(fn -> there |> Serving.stream(@input) |> Enum.map(read) end)
    pid = task.pid
    assert_receive {:read, ^pid}, 20_000
    %{results: [%{token_ids: whole}]} = Serving.batched_run(there, @input)
    {:message_queue_len, waiting} = Process.info(pid, :message_queue_len)
    assert waiting in 1..100
    for _ <- 1..400, do: send(pid, :go)
    assert Task.await(task) == whole
  end

  test "a request there is cancelled from here, and one of here from there", context do
    %{there: there, node: node} = context
    test = self()

    read = fn id ->
      send(test, {:read, self()})
      receive(do: (:go -> id))
    end

    for cancel <- [&Serving.cancel/1, &:erpc.call(node, Serving, :cancel, [&1])] do
      task = Task.async(fn -> there |> Serving.stream(@input) |> Enum.map(read) end)
      pid = task.pid
      assert_receive {:read, ^pid}, 20_000
      assert cancel.(task.pid) == :ok
      assert_soon(fn -> :erpc.call(node, Bombus, :memory_info, []).sequences == 0 end)
      for _ <- 1..400, do: send(task.pid, :go)
      assert length(Task.await(task)) in 1..399
    end

    assert %{results: [%{finish_reason: :length}]} = Serving.batched_run(there, @input)
  end
end
