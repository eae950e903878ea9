defmodule Bombus.Serving.Batch do
  @moduledoc false
  # A list of inputs. They are one caller's: as many run as fill the model's batch, and the others
  # wait here, where they take no place in the queue.

  alias Bombus.Error
  alias Bombus.Serving.{Remote, Request}

  # `running`: reference => {request, its place in the list with its input, chunks, the last first}
  defstruct [
    :serving,
    :server,
    :room,
    :todo,
    running: %{},
    monitors: %{},
    results: %{},
    full?: false
  ]

  @doc "`inputs`: each with its deadline; -> their results, in their order"
  def run(serving, inputs, server) do
    todo = Enum.with_index(inputs)
    advance(%__MODULE__{serving: serving, server: server, room: room(serving), todo: todo})
  end

  # Whoever ends is followed at once by one that waits in the queue.
  defp room(%{model: %{max_batch_size: most}, limits: limits}),
    do: 2 * min(most, limits.max_batch_size || most)

  defp advance(%{todo: [], running: running, results: results}) when running == %{} do
    results |> Enum.sort() |> Enum.map(fn {_index, result} -> result end)
  end

  defp advance(batch) do
    if room?(batch),
      do: batch |> start() |> advance(),
      else: batch |> await_event() |> advance()
  end

  defp room?(%{todo: []}), do: false
  defp room?(%{running: running}) when running == %{}, do: true
  defp room?(batch), do: not batch.full? and map_size(batch.running) < batch.room

  defp start(%{todo: [{{input, deadline}, _index} = next | todo]} = batch) do
    batch = %{batch | todo: todo}

    again? = batch.running != %{}

    case Remote.start(batch.serving, input, batch.server, deadline: deadline, again?: again?) do
      {:ok, request} -> put(batch, request, next, [])
      {:error, error} -> ended(batch, next, {:error, error})
    end
  rescue
    error ->
      for {_reference, {request, _next, _chunks}} <- batch.running, do: Request.cancel(request)
      reraise error, __STACKTRACE__
  end

  defp put(batch, %{reference: reference, monitor: monitor} = request, next, chunks) do
    running = Map.put(batch.running, reference, {request, next, chunks})
    %{batch | running: running, monitors: Map.put(batch.monitors, monitor, reference)}
  end

  defp await_event(%{running: running, monitors: monitors} = batch) do
    receive do
      {reference, event} when is_map_key(running, reference) ->
        handle(batch, reference, &Request.received(&1, event))

      {:DOWN, monitor, :process, _pid, reason} when is_map_key(monitors, monitor) ->
        handle(batch, monitors[monitor], &Request.down(&1, reason))
    after
      patience(batch) -> overdue(batch)
    end
  end

  # Of requests on another node. An atom is above all numbers.
  defp patience(%{running: running, server: server}) when node(server) != node() do
    running |> Enum.map(fn {_, {request, _, _}} -> Request.patience(request) end) |> Enum.min()
  end

  defp patience(_batch), do: :infinity

  defp overdue(%{running: running} = batch) do
    over =
      for {reference, {request, _, _}} <- running, Request.patience(request) == 0, do: reference

    Enum.reduce(over, batch, &handle(&2, &1, fn request -> Request.overdue(request) end))
  end

  # `event`: of the request
  defp handle(batch, reference, event) do
    {request, next, chunks} = batch.running[reference]

    case event.(request) do
      {:chunk, _ids, _text, _logprobs} = chunk ->
        put(batch, request, next, [chunk | chunks])

      {:done, reason, usage} ->
        result = Request.result(request, chunks, reason, usage)
        batch = batch |> remove(request) |> ended(next, result)
        if reason == :cancelled, do: cancel_rest(batch), else: batch

      {:error, error} ->
        batch |> remove(request) |> ended(next, {:error, error})
    end
  end

  defp remove(batch, %{reference: reference, monitor: monitor}) do
    running = Map.delete(batch.running, reference)
    %{batch | running: running, monitors: Map.delete(batch.monitors, monitor)}
  end

  # Where others of its own run, it has its turn after them.
  defp ended(batch, next, {:error, %Error{reason: :overloaded}}) when batch.running != %{},
    do: %{batch | todo: [next | batch.todo], full?: true}

  defp ended(batch, {_input, index}, {:error, %Error{reason: :overloaded}} = refused),
    do: %{batch | results: Map.put(batch.results, index, refused), full?: true}

  # To ask each time for a node that is gone may take seconds.
  defp ended(batch, {_input, index}, {:error, %Error{reason: :no_connection}} = lost),
    do: end_rest(%{batch | results: Map.put(batch.results, index, lost)}, lost)

  defp ended(batch, {_input, index}, result),
    do: %{batch | results: Map.put(batch.results, index, result), full?: false}

  # Whoever cancels means all that the process has asked for.
  defp cancel_rest(batch) do
    end_rest(batch, Request.cancelled(batch.serving.tokenizer != nil))
  end

  defp end_rest(batch, result) do
    rest = Map.new(batch.todo, fn {_input, index} -> {index, result} end)
    %{batch | todo: [], results: Map.merge(batch.results, rest)}
  end
end
