defmodule Bombus.Serving.Peer do
  @moduledoc false
  # What a caller says to the process that owns its request on another node (`Bombus.Serving.Remote`).

  alias Bombus.Error

  @doc "The end comes as for any other request."
  @spec cancel(pid(), reference()) :: term()
  def cancel(owner, reference), do: send(owner, {:cancel, reference})

  @doc "Of a request with a window: one more chunk is read."
  @spec acknowledge(pid(), reference()) :: term()
  def acknowledge(owner, reference), do: send(owner, {:acknowledge, reference})

  @doc "Nothing comes any more."
  @spec forget(reference(), reference()) :: :ok
  def forget(reference, monitor) do
    :erlang.unalias(reference)
    Process.demonitor(monitor, [:flush])
    flush(reference)
  end

  defp flush(reference) do
    receive do
      {^reference, _event} -> flush(reference)
    after
      0 -> :ok
    end
  end

  @doc "What the end of the owner says, where no event has come before."
  @spec lost(pid(), term()) :: {:error, Error.t()}
  def lost(owner, reason) do
    case reason do
      :noconnection ->
        no_connection(node(owner))

      {:undef, _stack} ->
        Error.error(:unsupported, "#{node(owner)} has another version of Bombus")

      _other ->
        Error.error(:stopped, "the request has ended on #{node(owner)}")
    end
  end

  @doc "The error for a node that is gone."
  @spec no_connection(node()) :: {:error, Error.t()}
  def no_connection(node), do: Error.error(:no_connection, "there is no connection to #{node}")
end
