defmodule Bombus.Serving.Server do
  @moduledoc false
  # A named process that holds a serving. Requests do not pass through it: it hands the serving
  # out, and its end is theirs. Those of other nodes are owned by processes that it starts.

  use GenServer

  alias Bombus.{Error, Native}
  alias Bombus.Serving.{Loader, Remote}

  # How often it looks whether the last request has ended.
  @nap 5

  def start_link(options), do: GenServer.start_link(__MODULE__, options, name: options[:name])

  @doc """
  The serving, and the process whose end is that of its requests; an error where it is stopping.
  Waits while it loads its model.
  """
  def checkout(name) do
    GenServer.call(name, :checkout, :infinity)
  end

  @impl true
  def init(options) do
    Process.flag(:trap_exit, true)

    case Loader.serving(options) do
      {:ok, serving} ->
        # A group of its own, whose requests it can count.
        group = Native.new_group(serving.limits)
        serving = %{serving | group: group, name: options[:name]}
        {:ok, %{serving: serving, drain: Keyword.get(options, :drain, 0)}}

      {:error, error} ->
        {:stop, error}
    end
  end

  @impl true
  def handle_call(:checkout, _from, state), do: {:reply, {:ok, state.serving, self()}, state}

  def handle_call({:start, input, reference}, from, %{serving: serving} = state) do
    server = self()
    spawn(fn -> Remote.own(serving, input, server, from, reference) end)
    {:noreply, state}
  end

  @impl true
  def handle_info(_other, state), do: {:noreply, state}

  # Nobody new comes in, and those who are there may end. What has not ended by then is cancelled
  # by the end of this process.
  @impl true
  def terminate(_reason, %{serving: serving, drain: drain}) do
    Native.close_group(serving.group)

    until =
      if drain == :infinity, do: :infinity, else: System.monotonic_time(:millisecond) + drain

    drain(serving.group, until)
  end

  # An atom is above all numbers.
  defp drain(group, until) do
    if Native.group_size(group) > 0 and System.monotonic_time(:millisecond) < until do
      refuse()
      drain(group, until)
    end
  end

  defp refuse do
    receive do
      {:"$gen_call", from, _call} ->
        GenServer.reply(from, Error.error(:stopped, "the serving is stopping"))
    after
      @nap -> :ok
    end
  end
end
