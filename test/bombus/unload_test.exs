defmodule Bombus.UnloadTest do
  # The counts are the VM's.
  use ExUnit.Case, async: false

  alias Bombus.{Error, Fixtures, Serving}

  @endless %{token_ids: [3, 1, 4, 1, 5], max_new_tokens: 300}

  # What others have left behind goes first.
  setup do
    for pid <- Process.list(), do: :erlang.garbage_collect(pid)
    settle(Bombus.memory_info())
  end

  defp settle(before) do
    Process.sleep(100)
    info = Bombus.memory_info()
    same? = Map.take(info, [:models, :adapters]) == Map.take(before, [:models, :adapters])
    if same?, do: :ok, else: settle(info)
  end

  defp load do
    model = Bombus.load_model!(Fixtures.checkpoint("f32-untied"), device: :cpu)
    {model, Serving.new(model, nil)}
  end

  defp models, do: Bombus.memory_info().models

  test "a model is gone while its struct is held" do
    before = models()
    {model, serving} = load()
    assert models() == before + 1
    active = Bombus.memory_info().active

    assert Bombus.unload(model) == :ok
    assert models() == before
    assert Bombus.memory_info().active < active

    assert {:error, %Error{reason: :unloaded, message: message}} = Serving.run(serving, @endless)
    assert message =~ "the model was unloaded"
    assert {:error, %Error{reason: :unloaded}} = Bombus.score(model, [1, 2, 3])

    assert_raise Error, ~r/unloaded/, fn ->
      serving |> Serving.stream(@endless) |> Enum.to_list()
    end

    # Once more, and still a model to look at.
    assert Bombus.unload(model) == :ok
    assert Bombus.unload(model, cancel: true) == :ok
    assert inspect(model) =~ "f32-untied"
  end

  test "requests that run end first" do
    {model, serving} = load()
    tasks = for _ <- 1..3, do: Task.async(fn -> Serving.run(serving, @endless) end)
    wait_until(fn -> Bombus.memory_info().sequences >= 3 end)
    assert Bombus.unload(model) == :ok

    for %{results: [result]} <- Task.await_many(tasks) do
      assert {length(result.token_ids), result.finish_reason} == {300, :length}
    end
  end

  test "or are cancelled" do
    {model, serving} = load()
    input = %{@endless | max_new_tokens: 500}
    tasks = for _ <- 1..3, do: Task.async(fn -> Serving.run(serving, input) end)
    wait_until(fn -> Bombus.memory_info().sequences >= 3 end)
    assert Bombus.unload(model, cancel: true) == :ok

    for %{results: [result]} <- Task.await_many(tasks) do
      assert result.finish_reason == :cancelled
      assert length(result.token_ids) < 500
    end
  end

  test "an adapter goes with the last request that has it" do
    {_model, serving} = load()
    path = Path.join(Fixtures.checkpoint("f32-untied"), "adapters/all-layers")
    before = Bombus.memory_info().adapters
    adapter = Bombus.load_adapter!(path)
    input = Map.put(@endless, :adapter, adapter)
    task = Task.async(fn -> Serving.run(serving, input) end)
    wait_until(fn -> Bombus.memory_info().sequences >= 1 end)

    assert Bombus.unload(adapter) == :ok
    assert Bombus.memory_info().adapters == before
    assert %{results: [%{finish_reason: :length}]} = Task.await(task)
    assert {:error, %Error{reason: :unloaded, message: message}} = Serving.run(serving, input)
    assert message =~ "the adapter was unloaded"
    assert Bombus.unload(adapter) == :ok
    assert %{results: [_result]} = Serving.run(serving, @endless)
  end

  test "requests with an adapter are cancelled, also where it was unloaded before" do
    {model, serving} = load()

    adapter = fn ->
      Bombus.load_adapter!(Path.join(Fixtures.checkpoint("f32-untied"), "adapters/all-layers"))
    end

    [gone, other] = [adapter.(), adapter.()]
    before = Bombus.memory_info().adapters
    endless = %{@endless | max_new_tokens: 500}
    run = fn input -> Task.async(fn -> Serving.run(serving, input) end) end
    cancelled = for _ <- 1..2, do: run.(Map.put(endless, :adapter, gone))
    kept = [run.(@endless), run.(Map.put(@endless, :adapter, other))]
    wait_until(fn -> Bombus.memory_info().sequences >= 4 end)

    waiting = Task.async(fn -> Bombus.unload(gone) end)
    assert Task.yield(waiting, 20) == nil
    assert Bombus.unload(gone, cancel: true) == :ok
    assert Task.await(waiting) == :ok
    assert Bombus.memory_info().adapters == before - 1

    for %{results: [result]} <- Task.await_many(cancelled) do
      assert result.finish_reason == :cancelled
      assert length(result.token_ids) < 500
    end

    for %{results: [result]} <- Task.await_many(kept), do: assert(result.finish_reason == :length)
    assert {:error, %Error{reason: :unloaded}} = Bombus.score(model, [1, 2], adapter: gone)
  end

  test "a tokenizer is refused afterwards" do
    model = Bombus.load_model!(:demo, device: :cpu)
    tokenizer = Bombus.load_tokenizer!(:demo)
    serving = Serving.new(model, tokenizer, max_new_tokens: 3)
    assert %{results: [_result]} = Serving.run(serving, "Tea")
    assert Bombus.unload(tokenizer) == :ok
    assert {:error, %Error{reason: :unloaded}} = Serving.run(serving, "Tea")
    assert Bombus.unload(tokenizer) == :ok
  end

  @tag :capture_log
  test "a serving that was given them says so, and so do its answers" do
    tokenizer = Bombus.load_tokenizer!(:demo)
    adapter = Bombus.load_adapter!({:demo, "pirate"})
    model = Bombus.load_model!(:demo, device: :cpu)
    serving = Serving.new(model, tokenizer, max_new_tokens: 3)
    text = %{text: "Tea"}
    ids = %{token_ids: [1, 2], adapter: nil}
    given = [model: model, tokenizer: tokenizer]

    # By another struct, which is all that its owner has.
    for {name, options, unloaded, input, others} <- [
          {OfAdapter, given ++ [adapter: adapter], adapter, text, ids},
          {OfTokenizer, given, tokenizer, text, nil},
          {OfModel, [model: model, tokenizer: nil], model, ids, nil},
          {OfServing, [serving: serving], model, ids, nil}
        ] do
      options = [name: name] ++ options
      start_supervised!({Serving, options})
      if unloaded != model, do: assert(%{state: :ready} = Serving.status(name))
      assert Bombus.unload(unloaded) == :ok

      assert %{state: {:failed, %Error{reason: :unloaded}}} = Serving.status(name)
      assert {:error, %Error{reason: :unloaded}} = Serving.batched_run(name, input)
      assert_raise Error, ~r/unloaded/, fn -> Enum.to_list(Serving.stream(name, input)) end
      if others, do: assert(%{results: [_result]} = Serving.batched_run(name, others))

      if unloaded == model,
        do: assert({:error, %Error{reason: :unloaded}} = Serving.await_ready(name))
    end
  end

  test "what is none of these is the caller's mistake" do
    assert_raise ArgumentError, ~r/a model, a tokenizer or an adapter/, fn ->
      Bombus.unload(:demo)
    end

    {model, _serving} = load()
    assert_raise ArgumentError, ~r/:cancel/, fn -> Bombus.unload(model, cancel: 1) end
    assert_raise ArgumentError, ~r/cancel/, fn -> Bombus.unload(model, cancle: true) end
    assert Bombus.unload(model) == :ok
  end

  defp wait_until(condition, tries \\ 2000) do
    cond do
      condition.() -> :ok
      tries == 0 -> flunk("it did not happen")
      true -> Process.sleep(2) && wait_until(condition, tries - 1)
    end
  end
end
