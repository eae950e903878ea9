defmodule Bombus.Serving.Client do
  @moduledoc false
  # Calls a serving by its name, on this node or another. Whatever keeps it from answering is an
  # error, never an exit.

  alias Bombus.Error
  alias Bombus.Serving.{Peer, Requests, Server}

  # A serving answers at once, or says when: what comes later is lost.
  @grace 5_000

  @doc """
  The serving, and the process whose end is that of its requests. While the model loads it waits for
  `timeout` milliseconds, or for as long as the serving says where that is nil; -> `:cancelled` where
  another process wants that.
  """
  def checkout(name, timeout) do
    with {:ok, server} <- find(name, patience_to_find(timeout)) do
      Requests.hold({:waiting, server}, fn ->
        call(name, server, {:checkout, timeout}, patience(timeout))
      end)
    end
  end

  def status(name) do
    with {:ok, server} <- find(name), do: call(name, server, :status, @grace)
  end

  defp patience_to_find(timeout) when is_integer(timeout), do: min(timeout, @grace)
  defp patience_to_find(_timeout), do: @grace

  defp patience(timeout) when is_integer(timeout), do: timeout + @grace
  defp patience(_timeout), do: :infinity

  defp call(name, server, request, timeout) do
    GenServer.call(server, request, timeout)
  catch
    :exit, {:noproc, _call} -> not_running(name)
    :exit, {{:nodedown, node}, _call} -> Peer.no_connection(node)
    :exit, {:timeout, _call} -> silent(name)
    :exit, _reason -> Error.error(:stopped, "the serving #{inspect(name)} has stopped")
  end

  # A process that is no serving might not survive a call.
  defp find(name, timeout \\ @grace)
  defp find({:global, _name} = name, timeout), do: find_here(name, timeout)

  defp find({:via, module, _name} = name, timeout) when is_atom(module) do
    unless Code.ensure_loaded?(module) and function_exported?(module, :whereis_name, 1) do
      raise ArgumentError, "expected a module that names processes, got: #{inspect(name)}"
    end

    find_here(name, timeout)
  end

  defp find(pid, timeout) when is_pid(pid), do: find_on(node(pid), pid, timeout)

  defp find({name, node}, timeout) when is_atom(name) and is_atom(node),
    do: find_on(node, name, timeout)

  defp find(name, timeout) when is_atom(name) and name not in [nil, true, false],
    do: find_here(name, timeout)

  defp find(other, _timeout) do
    raise ArgumentError, "expected the name of a serving, got: #{inspect(other)}"
  end

  defp find_on(node, name, timeout) when node == node(), do: find_here(name, timeout)

  defp find_on(node, name, timeout) do
    :erpc.call(node, __MODULE__, :find_here, [name, timeout], timeout)
  catch
    :error, {:erpc, :timeout} -> silent(node)
    :error, {:erpc, _reason} -> Peer.no_connection(node)
    _kind, _reason -> Error.error(:unsupported, "#{node} has no Bombus, or another version of it")
  end

  @doc false
  def find_here(name, timeout) do
    case whereis(name) do
      nil -> not_running(name)
      # A name of the cluster's.
      pid when node(pid) != node() -> find(pid, timeout)
      pid -> if serving?(pid), do: {:ok, pid}, else: not_running(name)
    end
  end

  defp whereis(name) do
    GenServer.whereis(name)
  rescue
    # A registry that is not there, or has no such names.
    _error in [ArgumentError, FunctionClauseError] -> nil
  end

  defp serving?(pid) do
    with {:dictionary, dictionary} <- Process.info(pid, :dictionary),
         {_key, call} <- List.keyfind(dictionary, :"$initial_call", 0) do
      call == {Server, :init, 1}
    else
      _other -> false
    end
  end

  defp not_running(name) do
    Error.error(
      :not_running,
      "there is no serving #{inspect(name)} (has its supervisor been started?)"
    )
  end

  defp silent(name), do: Error.error(:timeout, "#{inspect(name)} does not answer")
end
