defmodule Bombus.Serving.Server do
  @moduledoc false
  # A named process that holds a serving. Requests do not pass through it: it hands the serving
  # out, and its end is theirs.

  use GenServer

  def start_link(options) do
    GenServer.start_link(__MODULE__, Keyword.fetch!(options, :serving), name: options[:name])
  end

  @doc "The serving, and the process whose end is that of its requests."
  def checkout(name), do: GenServer.call(name, :checkout)

  @impl true
  def init(%Bombus.Serving{} = serving), do: {:ok, serving}

  @impl true
  def handle_call(:checkout, _from, serving), do: {:reply, {serving, self()}, serving}
end
