defmodule Bombus.StreamOwnerTest do
  # A stream's events are messages to the process that began it: another would wait for ever.
  use ExUnit.Case, async: true

  import Bombus.Fixtures, only: [assert_soon: 1]

  alias Bombus.{Fixtures, Serving}
  alias Bombus.Training.LoRA

  @input %{token_ids: [3, 1, 4, 1, 5], max_new_tokens: 400}

  setup do
    model = Bombus.load_model!(Fixtures.checkpoint("f32-untied"), device: :cpu)
    name = {:global, make_ref()}
    start_supervised!({Serving, serving: Serving.new(model, nil), name: name})
    %{name: name}
  end

  # After its first element; -> what goes on with it
  defp suspended(stream) do
    step = fn element, _elements -> {:suspend, element} end
    {:suspended, _element, continue} = Enumerable.reduce(stream, {:suspend, nil}, step)
    {:suspended, _element, continue} = continue.({:cont, nil})
    continue
  end

  defp elsewhere(work) do
    Task.async(fn -> assert_raise(ArgumentError, work).message end) |> Task.await(10_000)
  end

  defp idle?(name), do: match?(%{batch: 0, queue: 0}, Serving.status(name))

  test "it is read by that alone, and ends where another tries", %{name: name} do
    continue = name |> Serving.stream(@input) |> suspended()
    message = elsewhere(fn -> continue.({:cont, nil}) end)
    assert message =~ "a stream to be read by the process that began it, #{inspect(self())}"
    assert_soon(fn -> idle?(name) end)
  end

  test "another may halt it", %{name: name} do
    continue = name |> Serving.stream(@input) |> suspended()
    assert %{batch: 1} = Serving.status(name)
    assert {:halted, nil} = Task.await(Task.async(fn -> continue.({:halt, nil}) end), 10_000)
    assert_soon(fn -> idle?(name) end)
    # The process that began it can go on with others.
    assert %{results: [_result]} = Serving.batched_run(name, %{@input | max_new_tokens: 3})
  end

  test "in its own process it may be suspended, zipped and gone on with", %{name: name} do
    input = %{@input | max_new_tokens: 20}
    ids = name |> Serving.stream(input) |> Enum.to_list()
    assert length(ids) == 20
    streams = [Serving.stream(name, input), Serving.stream(name, input)]
    assert streams |> Stream.zip() |> Enum.to_list() == Enum.zip(ids, ids)
    continue = name |> Serving.stream(input) |> suspended()
    {:suspended, second, continue} = continue.({:cont, nil})
    assert second == Enum.at(ids, 1)
    assert {:halted, _element} = continue.({:halt, nil})
  end

  test "it begins in the process that reads first, whoever made it", %{name: name} do
    stream = Serving.stream(name, %{@input | max_new_tokens: 5})
    assert length(Task.await(Task.async(fn -> Enum.to_list(stream) end))) == 5
  end

  @tag :tmp_dir
  test "a training's events too", %{tmp_dir: dir} do
    lines = ~s({"type": "start"}\n{"type": "train", "iteration": 1}\n{"type": "done"}\n)
    File.write!(Path.join(dir, "training.jsonl"), lines)
    stream = LoRA.monitor_training(dir)
    continue = suspended(stream)
    assert {:suspended, %{type: :train}, continue} = continue.({:cont, nil})
    assert {:halted, _event} = continue.({:halt, nil})

    waiting = dir |> Path.join("other") |> tap(&File.mkdir_p!/1)
    File.write!(Path.join(waiting, "training.jsonl"), ~s({"type": "start"}\n))
    continue = waiting |> LoRA.monitor_training() |> suspended()
    assert elsewhere(fn -> continue.({:cont, nil}) end) =~ "process that began it"
  end
end
