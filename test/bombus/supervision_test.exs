defmodule Bombus.SupervisionTest do
  # Servings in supervision trees, and in clusters.
  use ExUnit.Case

  import Bombus.Fixtures, only: [assert_soon: 1]

  alias Bombus.{Error, Fixtures, Serving}

  @endless Fixtures.checkpoint("f32-untied")
  @input %{token_ids: [3, 1, 4, 1, 5], max_new_tokens: 400}

  defp ids(%{results: [%{token_ids: ids}]}), do: ids
  defp text(%{results: [%{text: text}]}), do: text

  describe "a serving that loads its model" do
    test "from a source, with all that belongs to it" do
      start_supervised!(
        {Serving, name: Loaded, model: :demo, adapter: {:demo, "pirate"}, max_new_tokens: 40}
      )

      assert text(Serving.batched_run(Loaded, "Write a post about coffee")) =~
               ~r/ahoy|arr|matey|ye/i

      plain = %{text: "Write a post about coffee", adapter: nil}
      refute text(Serving.batched_run(Loaded, plain)) =~ ~r/ahoy|arr|matey/i
    end

    test "its limits are the model's" do
      start_supervised!(
        {Serving, name: Limited, model: @endless, tokenizer: nil, max_context: 9, max_queue: 1}
      )

      assert length(ids(Serving.batched_run(Limited, @input))) == 4
    end

    test "from a model that is loaded" do
      model = Bombus.load_model!(@endless)
      start_supervised!({Serving, name: Given, model: model, tokenizer: nil, max_batch_size: 1})
      assert length(ids(Serving.batched_run(Given, %{@input | max_new_tokens: 3}))) == 3
    end

    test "loads it again after a crash" do
      start_supervised!({Serving, name: Restarted, model: @endless, tokenizer: nil})
      before = ids(Serving.batched_run(Restarted, @input))
      killed = Process.whereis(Restarted)
      Process.exit(killed, :kill)
      assert_soon(fn -> Process.whereis(Restarted) not in [nil, killed] end)
      assert ids(Serving.batched_run(Restarted, @input)) == before
    end
  end

  describe "a serving that stops" do
    # Under a supervisor that another process may stop.
    defp start_draining(name) do
      serving = Serving.new(Bombus.load_model!(@endless), nil)
      child = {Serving, serving: serving, name: name, drain: 60_000}
      {:ok, supervisor} = Supervisor.start_link([child], strategy: :one_for_one)
      supervisor
    end

    test "lets its requests end where it drains" do
      supervisor = start_draining(Draining)
      tasks = for _ <- 1..3, do: Task.async(fn -> Serving.batched_run(Draining, @input) end)
      assert_soon(fn -> Bombus.memory_info().sequences == 3 end)
      stopping = Task.async(fn -> Supervisor.stop(supervisor) end)
      assert Enum.all?(Task.await_many(tasks, 60_000), &(length(ids(&1)) == 400))
      Task.await(stopping)
      assert {:error, %Error{reason: :not_running}} = Serving.batched_run(Draining, @input)
    end

    test "answers nobody new while it drains" do
      supervisor = start_draining(Refusing)
      made_before = Serving.stream(Refusing, @input)
      many = List.duplicate(@input, 60)
      long = Task.async(fn -> Serving.batched_run(Refusing, many) end)
      assert_soon(fn -> Bombus.memory_info().sequences > 50 end)
      stopping = Task.async(fn -> Supervisor.stop(supervisor) end)
      assert refused(Refusing, 200)
      assert_raise Error, ~r/stopping/, fn -> Enum.to_list(made_before) end
      assert Enum.all?(Task.await(long, 60_000), &(length(ids(&1)) == 400))
      Task.await(stopping, 60_000)
    end

    # Sooner or later it says so.
    defp refused(_name, 0), do: false

    defp refused(name, tries) do
      case Serving.batched_run(name, %{@input | max_new_tokens: 1}) do
        {:error, %Error{reason: reason}} -> reason in [:stopped, :not_running]
        _answered -> refused(name, tries - 1)
      end
    end
  end

  test "models side by side generate at the same time" do
    names = [Left, Right]

    for name <- names,
        do: start_supervised!({Serving, name: name, model: @endless, tokenizer: nil})

    expected = ids(Serving.batched_run(Left, @input))
    test = self()

    tasks =
      for name <- names do
        Task.async(fn ->
          Enum.map(Serving.stream(name, @input), fn id -> send(test, {name, id}) && id end)
        end)
      end

    assert [^expected, ^expected] = Task.await_many(tasks, 60_000)
    order = for _ <- 1..800, do: assert_received({name, _id}) && name
    # Neither waits for the other's end.
    assert order |> Enum.chunk_by(& &1) |> length() > 4
  end

  describe "from another node" do
    setup do
      on_exit(fn -> Node.stop() end)
      {peer, node} = Fixtures.start_peer(:code.get_path())
      {:ok, _} = :erpc.call(node, Application, :ensure_all_started, [:elixir])
      start_supervised!({Serving, name: Far, model: @endless, tokenizer: nil})
      %{peer: peer, node: node, far: {Far, node()}}
    end

    test "it answers, streams, and says what is wrong", %{node: node, far: far} do
      expected = Serving.batched_run(Far, @input)
      call = &:erpc.call(node, Serving, &1, &2)
      assert ids(call.(:batched_run, [far, @input])) == ids(expected)
      assert [one, two] = call.(:batched_run, [far, [@input, %{@input | max_new_tokens: 2}]])
      assert {ids(one), length(ids(two))} == {ids(expected), 2}

      assert :erpc.call(node, Fixtures, :stream, [far, @input]) == ids(expected)

      assert_raise ErlangError, ~r/ArgumentError.*unknown option/, fn ->
        call.(:batched_run, [far, Map.put(@input, :sede, 1)])
      end

      long = %{token_ids: List.duplicate(1, 600)}
      assert {:error, %Error{reason: :prompt_too_long}} = call.(:batched_run, [far, long])
      # The other node has loaded nothing for it.
      assert :erpc.call(node, :code, :is_loaded, [Bombus.Native]) == false
    end

    test "adapters of the serving's node go along", %{node: node, far: far} do
      adapter = Bombus.load_adapter!(Fixtures.adapter("f32-untied", "all-layers"))
      input = Map.merge(@input, %{adapter: adapter, max_new_tokens: 20})
      there = :erpc.call(node, Serving, :batched_run, [far, input])
      assert ids(there) == ids(Serving.batched_run(Far, input))
      assert ids(there) != ids(Serving.batched_run(Far, %{input | adapter: nil}))
      foreign = %{input | adapter: %{adapter | ref: make_ref()}}
      assert {:error, %Error{} = error} = :erpc.call(node, Serving, :batched_run, [far, foreign])
      assert error.message =~ "loaded there"
    end

    test "a stream that is halted, a caller and a node that die cancel", context do
      %{peer: peer, node: node, far: far} = context
      free? = fn -> match?(%{sequences: 0, kv: 0}, Bombus.memory_info()) end

      assert [_, _] = :erpc.call(node, Fixtures, :take, [far, @input, 2])
      assert free?.()
      caller = Node.spawn(node, Fixtures, :run_again_and_again, [far, @input])
      assert_soon(fn -> Bombus.memory_info().sequences == 1 end)
      Process.exit(caller, :kill)
      assert_soon(free?)
      Node.spawn(node, Fixtures, :run_again_and_again, [far, @input])
      assert_soon(fn -> Bombus.memory_info().sequences == 1 end)
      :peer.stop(peer)
      assert_soon(free?)
    end

    test "its end is that of the requests", %{node: node, far: far} do
      Node.spawn(node, Fixtures, :answer, [far, List.duplicate(@input, 40), self()])

      assert_soon(fn -> Bombus.memory_info().sequences > 30 end)
      stop_supervised!(Far)
      assert_receive {:answer, answers}, 10_000
      assert Enum.any?(answers, &match?({:error, %Error{reason: :stopped}}, &1))
    end
  end
end
