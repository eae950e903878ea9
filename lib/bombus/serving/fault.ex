defmodule Bombus.Serving.Fault do
  @moduledoc false
  # Errors after which a model may not answer any more: its serving may load it anew.

  alias Bombus.Error

  # What the model itself answers where it will not answer any more.
  @reasons [:io, :stopped, :unloaded]

  @doc "Whether an error may be the end of a model."
  @spec end?(Error.t()) :: boolean()
  def end?(%Error{reason: reason}), do: reason in @reasons

  @doc "Tells a serving of such an error of one of its requests; `model` is the model's reference."
  @spec report(pid(), reference(), Error.t()) :: :ok
  def report(server, model, error) do
    if end?(error), do: send(server, {:suspect, model})
    :ok
  end
end
