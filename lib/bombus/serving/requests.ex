defmodule Bombus.Serving.Requests do
  @moduledoc false
  # Which process runs which requests, so that another can cancel them.

  use GenServer

  alias Bombus.Native
  alias Bombus.Serving.Peer

  def start_link(_options), do: GenServer.start_link(__MODULE__, nil, name: __MODULE__)

  @doc """
  The calling process runs a request: `{:local, canceller}`, `{:remote, owner}` or, where it waits for
  a model that loads, `{:waiting, server}`.
  """
  def add(reference, request) do
    if running?() do
      :ets.insert(__MODULE__, {self(), reference, request})
      send(__MODULE__, {:watch, self()})
    end

    :ok
  end

  def remove(reference, owner \\ self()) do
    if running?(), do: :ets.match_delete(__MODULE__, {owner, reference, :_})
    :ok
  end

  @doc "As long as `work` takes."
  def hold(request, work) do
    reference = make_ref()
    add(reference, request)

    try do
      work.()
    after
      remove(reference)
    end
  end

  @doc "Cancels all requests of a process, on whichever node it lives."
  def cancel(pid) when node(pid) != node(),
    do: GenServer.cast({__MODULE__, node(pid)}, {:cancel, pid})

  def cancel(pid) do
    if running?(), do: Enum.each(:ets.lookup(__MODULE__, pid), &cancel_one/1)
    :ok
  end

  defp cancel_one({_pid, _reference, {:local, canceller}}), do: Native.cancel(canceller)
  defp cancel_one({_pid, reference, {:remote, owner}}), do: Peer.cancel(owner, reference)
  defp cancel_one({pid, _reference, {:waiting, server}}), do: send(server, {:cancel, pid})

  # A node may call the servings of others without having started this application.
  defp running?, do: :ets.whereis(__MODULE__) != :undefined

  @impl true
  def init(nil) do
    :ets.new(__MODULE__, [:named_table, :public, :duplicate_bag, write_concurrency: true])
    {:ok, MapSet.new()}
  end

  @impl true
  def handle_cast({:cancel, pid}, watched) do
    cancel(pid)
    {:noreply, watched}
  end

  # What a process that was killed has not removed.
  @impl true
  def handle_info({:watch, pid}, watched) do
    if pid not in watched, do: Process.monitor(pid)
    {:noreply, MapSet.put(watched, pid)}
  end

  def handle_info({:DOWN, _monitor, :process, pid, _reason}, watched) do
    :ets.delete(__MODULE__, pid)
    {:noreply, MapSet.delete(watched, pid)}
  end
end
