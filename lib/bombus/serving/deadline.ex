defmodule Bombus.Serving.Deadline do
  @moduledoc false
  # When a request must have its answer: this node's monotonic time in milliseconds, or :infinity.

  alias Bombus.Error

  @type t :: integer() | :infinity

  def now, do: System.monotonic_time(:millisecond)

  @doc "`timeout` milliseconds after `begun`; `nil` is no limit."
  def new(timeout, begun \\ now())
  def new(timeout, _begun) when timeout in [nil, :infinity], do: :infinity
  def new(timeout, begun), do: begun + timeout

  @doc "The milliseconds that are left, or `:infinity`."
  def left(:infinity), do: :infinity
  def left(deadline), do: max(deadline - now(), 0)

  @doc "The milliseconds that are left as the engine takes them; nil is no limit."
  def timeout(:infinity), do: nil
  def timeout(deadline), do: left(deadline)

  def error, do: Error.error(:timeout, "the request took longer than its :timeout")
end
