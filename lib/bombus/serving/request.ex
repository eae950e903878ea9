defmodule Bombus.Serving.Request do
  @moduledoc false
  # A request in the engine, owned by the process that started it: its events are messages to it.

  alias Bombus.{Error, Native, Telemetry}
  alias Bombus.Serving.{Deadline, Fault, Options, Peer, Requests}

  @enforce_keys [:reference, :generation, :monitor, :tokenizer?]
  defstruct [:telemetry, :server, :model, :window, :owner, deadline: :infinity] ++ @enforce_keys

  # Another node says that the time is over; where it does not say anything, it is over so much later.
  @grace 500

  # How long the end of a request on another node is waited for that was cancelled.
  @patience 5_000

  @doc """
  Starts a request on this node. Where `server` is a process, its end is the request's.

    * `:deadline` - when it must have ended
    * `:window` - so many chunks may lie unread in the mailbox: what comes then is joined to one, and
      in the end the sequence waits for its reader
    * `:again?` - where the queue is full, it will be tried again: nobody hears of it
  """
  def start(serving, {prompt, own}, server, options \\ []) do
    reference = make_ref()
    now = System.monotonic_time()
    timeout = Deadline.timeout(Keyword.get(options, :deadline, :infinity))
    limits = %{timeout: timeout, window: options[:window]}
    started = Error.from_native(native(serving, prompt, own, limits, reference))

    if options[:again?] && match?({:error, %Error{reason: :overloaded}}, started) do
      started
    else
      report(started, server, serving.model.ref)
      telemetry = begin(serving, own.adapter, reference, now)

      with {:ok, generation} <- told(started, telemetry) do
        request = %__MODULE__{
          reference: reference,
          generation: generation,
          owner: self(),
          monitor: server && Process.monitor(server),
          tokenizer?: serving.tokenizer != nil,
          window: options[:window],
          telemetry: telemetry,
          server: server,
          model: serving.model.ref
        }

        Requests.add(reference, {:local, Native.canceller(generation)})
        {:ok, request}
      end
    end
  end

  defp native(serving, prompt, options, limits, reference) do
    tokenizer = serving.tokenizer && serving.tokenizer.ref
    adapter = options.adapter && options.adapter.ref
    options = Map.merge(Options.to_native(options), limits)

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
  The next event: `{:chunk, ids, text, logprobs}`, `{:done, reason, usage}` or `{:error, error}`.
  Raises in another process than the one that started it: events are messages to that.
  """
  def next(%__MODULE__{owner: owner}) when owner != self() do
    raise ArgumentError,
          "expected a stream to be read by the process that began it, #{inspect(owner)}, " <>
            "got: #{inspect(self())}"
  end

  def next(%__MODULE__{reference: reference, monitor: monitor} = request) do
    receive do
      {^reference, event} -> received(request, event)
      {:DOWN, ^monitor, :process, _pid, reason} -> down(request, reason)
    after
      patience(request) -> overdue(request)
    end
  end

  @doc "How long to wait for the next event: the engine here always says when the time is over."
  def patience(%__MODULE__{deadline: :infinity}), do: :infinity
  def patience(%__MODULE__{deadline: deadline}), do: Deadline.left(deadline + @grace)

  @doc "What a message of the engine says."
  def received(request, {:chunk, _ids, _text, _logprobs} = chunk) do
    if request.window, do: acknowledge(request)
    chunk
  end

  def received(request, event) do
    ended(request)
    event = Error.from_native(event)

    report(event, request.server, request.model)
    told(event, request.telemetry)
  end

  # The serving may be able to load the model anew.
  defp report({:error, error}, server, model) when is_pid(server),
    do: Fault.report(server, model, error)

  defp report(_event, _server, _model), do: :ok

  defp acknowledge(%{generation: owner, reference: reference}) when is_pid(owner),
    do: Peer.acknowledge(owner, reference)

  defp acknowledge(%{generation: generation}), do: Native.acknowledge(generation, 1)

  @doc "What the end of the monitored process says: the serving's, or the owner's on another node."
  def down(%__MODULE__{generation: owner} = request, reason) when is_pid(owner) do
    ended(request)
    Peer.lost(owner, reason)
  end

  def down(request, _reason) do
    cancel(request)
    Error.error(:stopped, "the serving has stopped")
  end

  @doc "The other node has said nothing until the end of the time."
  def overdue(%__MODULE__{generation: owner} = request) do
    Peer.cancel(owner, request.reference)
    ended(request)
    Deadline.error()
  end

  @doc "Frees the sequence, and waits until the engine has said so; in another process without a wait."
  def cancel(%__MODULE__{owner: owner, reference: reference} = request) when owner != self() do
    if is_pid(request.generation),
      do: Peer.cancel(request.generation, reference),
      else: Native.cancel(request.generation)

    Requests.remove(reference, owner)
  end

  def cancel(%__MODULE__{generation: owner} = request) when is_pid(owner) do
    Peer.cancel(owner, request.reference)
    drain(request, @patience)
    ended(request)
  end

  def cancel(request) do
    Native.cancel(request.generation)
    request |> drain(:infinity) |> told(request.telemetry)
    ended(request)
  end

  # Every request has exactly one end, also where it was cancelled. Only that of another node may
  # get lost, with the node.
  defp drain(%{reference: reference, monitor: monitor} = request, patience) do
    receive do
      {^reference, {:chunk, _ids, _text, _logprobs}} -> drain(request, patience)
      {^reference, event} -> Error.from_native(event)
      {:DOWN, ^monitor, :process, _pid, _reason} when patience != :infinity -> :lost
    after
      patience -> :lost
    end
  end

  # Nothing of it comes any more, and nobody can cancel it.
  defp ended(%__MODULE__{generation: owner} = request) when is_pid(owner) do
    Requests.remove(request.reference)
    Peer.forget(request.reference, request.monitor)
  end

  defp ended(%__MODULE__{monitor: monitor} = request) do
    Requests.remove(request.reference)
    if monitor, do: Process.demonitor(monitor, [:flush])
  end

  @doc "All events to the end, as a result."
  def collect(%__MODULE__{} = request), do: collect(request, [])

  defp collect(request, chunks) do
    case next(request) do
      {:chunk, _ids, _text, _logprobs} = chunk -> collect(request, [chunk | chunks])
      {:done, reason, usage} -> {:ok, result(request, chunks, reason, usage)}
      {:error, error} -> {:error, error}
    end
  end

  @doc "The result of a request that was cancelled before it began."
  def cancelled(tokenizer?) do
    summary = %{input: 0, cached: 0, output: 0, padding: 0}
    text = if tokenizer?, do: ""

    entry = %{
      text: text,
      token_ids: [],
      finish_reason: :cancelled,
      unfinished_thinking: false,
      token_summary: summary
    }

    %{results: [entry]}
  end

  @doc "Bumblebee's result, with more. `chunks`: the last first"
  def result(request, chunks, reason, usage) do
    chunks = Enum.reverse(chunks)
    ids = for {:chunk, ids, _text, _logprobs} <- chunks, id <- ids, do: id

    entry = %{
      text: if(request.tokenizer?, do: for({:chunk, _, text, _} <- chunks, into: "", do: text)),
      token_ids: ids,
      finish_reason: reason,
      unfinished_thinking: usage.thinking,
      token_summary: %{
        input: usage.prompt_tokens,
        cached: usage.cached_tokens,
        output: length(ids),
        padding: 0
      }
    }

    logprobs =
      for {:chunk, ids, _text, logprobs} <- chunks,
          {id, {chosen, top}} <- Enum.zip(ids, logprobs),
          do: logprobs(id, chosen, top)

    case logprobs do
      [] -> %{results: [entry]}
      logprobs -> %{results: [Map.put(entry, :logprobs, logprobs)]}
    end
  end

  defp logprobs(id, chosen, top) do
    top = for {id, logprob} <- top, do: %{token_id: id, logprob: logprob}
    %{token_id: id, logprob: chosen, top: top}
  end

  # -> what belongs to its end
  defp begin(serving, adapter, reference, now) do
    metadata = %{
      model: serving.model.name,
      serving: serving.name,
      adapter: adapter,
      request: reference
    }

    {Telemetry.start([:bombus, :generation], metadata, now), metadata}
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
