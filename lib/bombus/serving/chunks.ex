defmodule Bombus.Serving.Chunks do
  @moduledoc false
  # A request as a stream: chunks of text, of token ids where there is no tokenizer, and at the end its
  # result where that is wanted.

  alias Bombus.Error
  alias Bombus.Serving.{Deadline, Remote, Request}

  # How many may lie unread.
  @window 64

  @doc "How many chunks may lie in the reader's mailbox."
  def window, do: @window

  @doc "`input`: as `Input.normalize!/2` gives it; `server` is the process of a named serving"
  def stream(serving, input, server) do
    options = with {:ok, {_prompt, options}} <- input, do: options

    fn -> {start(serving, input, server), []} end
    |> Stream.resource(&next(&1, options), &halt/1)
    # Raised behind the resource: a request that has ended must not be cancelled.
    |> Stream.map(fn
      {:error, error} -> raise error
      element -> element
    end)
  end

  # Its time begins when it is first asked.
  defp start(serving, {:ok, {_prompt, options} = input}, server) do
    deadline = Deadline.new(options.timeout)

    serving
    |> Remote.start(input, server, deadline: deadline, window: @window)
    |> Error.unwrap!()
  end

  defp start(_serving, {:error, error}, _server), do: raise(error)

  defp next(:done, _options), do: {:halt, :done}

  defp next({request, chunks}, options) do
    case Request.next(request) do
      {:chunk, _ids, _text, _logprobs} = chunk ->
        # Only a result at the end needs them again.
        chunks = if options.stream_done, do: [chunk | chunks], else: []
        {elements(request, chunk), {request, chunks}}

      {:done, reason, usage} ->
        if options.stream_done,
          do: {[done: Request.result(request, chunks, reason, usage)], :done},
          else: {[], :done}

      {:error, error} ->
        {[error: error], :done}
    end
  end

  defp elements(%{tokenizer?: false}, {:chunk, ids, _text, _logprobs}), do: ids
  defp elements(_request, {:chunk, _ids, "", _logprobs}), do: []
  defp elements(_request, {:chunk, _ids, text, _logprobs}), do: [text]

  defp halt(:done), do: :ok
  defp halt({request, _chunks}), do: Request.cancel(request)
end
