defmodule Bombus.Serving.Request do
  @moduledoc false
  # A request in the engine, owned by the process that started it: its events are messages to it.

  alias Bombus.{Error, Native, Serving, Telemetry}
  alias Bombus.Serving.{Options, Remote}

  @enforce_keys [:reference, :generation, :monitor, :tokenizer?]
  defstruct [:telemetry | @enforce_keys]

  @doc """
  Starts a request. Where `server` is a process, its end is the request's; where that is on another
  node, the request runs there.
  """
  def start(%Serving{} = serving, input, server) when node(server) != node() do
    Remote.start(serving, input, server)
  end

  def start(%Serving{} = serving, {prompt, options}, server) do
    reference = make_ref()
    metadata = metadata(serving, options, reference)
    begun = Telemetry.start([:bombus, :generation], metadata)
    started = native(serving, prompt, options, reference)

    case started |> Error.from_native() |> told({begun, metadata}) do
      {:error, error} ->
        {:error, error}

      {:ok, generation} ->
        {:ok,
         %__MODULE__{
           reference: reference,
           generation: generation,
           monitor: server && Process.monitor(server),
           tokenizer?: serving.tokenizer != nil,
           telemetry: {begun, metadata}
         }}
    end
  end

  defp native(serving, prompt, options, reference) do
    tokenizer = serving.tokenizer && serving.tokenizer.ref
    adapter = options.adapter && options.adapter.ref
    options = Options.to_native(options)

    Native.generate(
      serving.model.ref,
      tokenizer,
      adapter,
      serving.group,
      prompt,
      options,
      reference
    )
  end

  @doc """
  The next event: `{:chunk, id, text, logprobs}`, `{:done, reason, usage}` or `{:error, error}`.
  """
  def next(%__MODULE__{reference: reference, monitor: monitor} = request) do
    receive do
      {^reference, event} ->
        received(request, event)

      {:DOWN, ^monitor, :process, _pid, _reason} ->
        cancel(request)
        Error.error(:stopped, "the serving stopped")
    end
  end

  @doc "What a message of the engine says."
  def received(_request, {:chunk, _id, _text, _logprobs} = chunk), do: chunk

  def received(request, event) do
    demonitor(request)
    event |> Error.from_native() |> told(request.telemetry)
  end

  @doc "Frees the sequence, and waits until the engine has said so."
  def cancel(%__MODULE__{generation: generation} = request) do
    if is_pid(generation),
      do: Remote.cancel(generation, request.reference),
      else: Native.cancel(generation)

    request |> drain() |> told(request.telemetry)
    demonitor(request)
  end

  # Every request has exactly one end, also where it was cancelled. Only that of another node may
  # get lost, with the node.
  defp drain(%{reference: reference, generation: generation, monitor: monitor} = request) do
    receive do
      {^reference, {:chunk, _id, _text, _logprobs}} -> drain(request)
      {^reference, event} -> Error.from_native(event)
      {:DOWN, ^monitor, :process, ^generation, _reason} -> :lost
    end
  end

  @doc "All events to the end, as a result."
  def collect(%__MODULE__{} = request), do: collect(request, [])

  defp collect(request, chunks) do
    case next(request) do
      {:chunk, _id, _text, _logprobs} = chunk -> collect(request, [chunk | chunks])
      {:done, reason, usage} -> {:ok, result(request, chunks, reason, usage)}
      {:error, error} -> {:error, error}
    end
  end

  @doc "Bumblebee's result, with more. `chunks`: the last first"
  def result(request, chunks, reason, usage) do
    chunks = Enum.reverse(chunks)
    ids = for {:chunk, id, _text, _logprobs} when id != nil <- chunks, do: id

    entry = %{
      text: if(request.tokenizer?, do: for({:chunk, _, text, _} <- chunks, into: "", do: text)),
      token_ids: ids,
      finish_reason: reason,
      token_summary: %{
        input: usage.prompt_tokens,
        cached: usage.cached_tokens,
        output: length(ids),
        padding: 0
      }
    }

    case for {:chunk, id, _text, {chosen, top}} <- chunks, do: logprobs(id, chosen, top) do
      [] -> %{results: [entry]}
      logprobs -> %{results: [Map.put(entry, :logprobs, logprobs)]}
    end
  end

  defp logprobs(id, chosen, top) do
    top = for {id, logprob} <- top, do: %{token_id: id, logprob: logprob}
    %{token_id: id, logprob: chosen, top: top}
  end

  defp demonitor(%{monitor: nil}), do: :ok
  defp demonitor(%{monitor: monitor}), do: Process.demonitor(monitor, [:flush])

  defp metadata(serving, options, reference) do
    %{
      model: serving.model.name,
      serving: serving.name,
      adapter: options.adapter,
      request: reference
    }
  end

  # What another node's engine does is told there.
  defp told(event, nil), do: event

  defp told({:done, reason, usage} = event, {begun, metadata}) do
    duration = Telemetry.since(begun)
    queued = Telemetry.native(usage.queued)
    seconds = max(usage.total - usage.queued, 1) / 1.0e9

    measurements = %{
      duration: duration,
      queue_time: queued,
      time_to_first_token: Telemetry.native(usage.first_token),
      input_tokens: usage.prompt_tokens,
      cached_tokens: usage.cached_tokens,
      output_tokens: usage.output_tokens,
      tokens_per_second: usage.output_tokens / seconds
    }

    metadata = Map.put(metadata, :finish_reason, reason)
    Telemetry.execute([:bombus, :generation, :stop], measurements, metadata)
    event
  end

  defp told({:error, error} = event, {begun, metadata}) do
    metadata = Map.merge(metadata, %{kind: :error, reason: error, stacktrace: []})
    measurements = %{duration: Telemetry.since(begun)}
    Telemetry.execute([:bombus, :generation, :exception], measurements, metadata)
    event
  end

  defp told(other, _telemetry), do: other
end
