defmodule Bombus.Serving.Request do
  @moduledoc false
  # A request in the engine, owned by the process that started it: its events are messages to it.

  alias Bombus.{Error, Native, Serving}
  alias Bombus.Serving.Options

  @enforce_keys [:reference, :generation, :monitor, :tokenizer?]
  defstruct @enforce_keys

  @doc """
  Starts a request. Where `server` is a process, its end is the request's.
  """
  def start(%Serving{} = serving, {prompt, options}, server) do
    reference = make_ref()
    adapter = options.adapter && options.adapter.ref
    tokenizer = serving.tokenizer && serving.tokenizer.ref
    native = Options.to_native(options)

    with {:ok, generation} <-
           serving.model.ref
           |> Native.generate(tokenizer, adapter, prompt, native, reference)
           |> Error.from_native() do
      {:ok,
       %__MODULE__{
         reference: reference,
         generation: generation,
         monitor: server && Process.monitor(server),
         tokenizer?: tokenizer != nil
       }}
    end
  end

  @doc "The next event: `{:chunk, ids, text}`, `{:done, reason, prompt_tokens}` or `{:error, error}`."
  def next(%__MODULE__{reference: reference, monitor: monitor} = request) do
    receive do
      {^reference, event} ->
        if match?({:chunk, _ids, _text}, event), do: event, else: ended(request, event)

      {:DOWN, ^monitor, :process, _pid, _reason} ->
        cancel(request)
        Error.error(:stopped, "the serving stopped")
    end
  end

  @doc "Frees the sequence, and waits until the engine has said so."
  def cancel(%__MODULE__{reference: reference} = request) do
    Native.cancel(request.generation)
    drain(reference)
    demonitor(request)
  end

  @doc "All events to the end, as a result."
  def collect(%__MODULE__{} = request), do: collect(request, [], [])

  defp collect(request, ids, text) do
    case next(request) do
      {:chunk, new_ids, new_text} -> collect(request, [new_ids | ids], [new_text | text])
      {:done, reason, prompt_tokens} -> {:ok, result(request, ids, text, reason, prompt_tokens)}
      {:error, error} -> {:error, error}
    end
  end

  @doc "Bumblebee's result. `ids` and `text` are the chunks, the last first."
  def result(request, ids, text, reason, prompt_tokens) do
    ids = ids |> Enum.reverse() |> Enum.concat()
    text = if request.tokenizer?, do: text |> Enum.reverse() |> IO.iodata_to_binary()

    %{
      results: [
        %{
          text: text,
          token_ids: ids,
          finish_reason: reason,
          token_summary: %{input: prompt_tokens, output: length(ids), padding: 0}
        }
      ]
    }
  end

  defp ended(request, event) do
    demonitor(request)
    Error.from_native(event)
  end

  defp demonitor(%{monitor: nil}), do: :ok
  defp demonitor(%{monitor: monitor}), do: Process.demonitor(monitor, [:flush])

  # Every request has exactly one end, also where it was cancelled.
  defp drain(reference) do
    receive do
      {^reference, {:chunk, _ids, _text}} -> drain(reference)
      {^reference, _end} -> :ok
    end
  end
end
