defmodule Mix.Bombus.Terminal do
  @moduledoc false
  # Ctrl-C as a message, in place of the VM's break menu. A terminal turns it into SIGINT, which the
  # VM keeps for itself; so the terminal is told to make it SIGQUIT, which a process may handle.

  @behaviour :gen_event

  @doc """
  Runs a function while Ctrl-C sends `:interrupt` to the caller, where there is a terminal and a
  shell that can set it. The terminal is as it was afterwards.
  """
  @spec with_interrupts((-> result)) :: result when result: term()
  def with_interrupts(fun) do
    case set(device()) do
      {:ok, restore} ->
        caller = self()
        swap({:erl_signal_handler, []}, {__MODULE__, caller})
        :ok = :os.set_signal(:sigquit, :handle)

        try do
          fun.()
        after
          :os.set_signal(:sigquit, :default)
          swap({__MODULE__, []}, {:erl_signal_handler, []})
          restore.()
        end

      :error ->
        fun.()
    end
  end

  @doc "Whether somebody types at a terminal."
  @spec terminal?() :: boolean()
  def terminal? do
    # Where input is captured, the group leader is no terminal and does not say so.
    case :io.getopts() do
      options when is_list(options) -> options[:stdin] == true and options[:stdout] == true
      _error -> false
    end
  end

  defp swap(old, new), do: :gen_event.swap_handler(:erl_signal_server, old, new)

  # IEx has a terminal of its own kind.
  defp device do
    if terminal?() and not IEx.started?() do
      case System.cmd("ps", ["-o", "tty=", "-p", System.pid()], stderr_to_stdout: true) do
        {name, 0} -> "/dev/" <> String.trim(name)
        _error -> nil
      end
    end
  rescue
    ErlangError -> nil
  end

  defp set(nil), do: :error

  defp set(device) do
    with {:ok, saved} <- stty(device, ["-g"]),
         {:ok, _nothing} <- stty(device, ["intr", "undef", "quit", "^C"]) do
      {:ok, fn -> stty(device, [String.trim(saved)]) end}
    end
  end

  # A program of the VM's has no terminal but the one that it is given.
  defp stty(device, arguments) do
    script = ~s(device=$1; shift; exec stty "$@" < "$device")

    case System.cmd("sh", ["-c", script, "sh", device | arguments], stderr_to_stdout: true) do
      {output, 0} -> {:ok, output}
      _error -> :error
    end
  end

  # What handles the VM's signals: others go on to its own handler.

  @impl :gen_event
  def init({caller, _result}), do: {:ok, caller}

  @impl :gen_event
  def handle_event(:sigquit, caller) do
    send(caller, :interrupt)
    {:ok, caller}
  end

  def handle_event(signal, caller) do
    {:ok, _state} = :erl_signal_handler.handle_event(signal, [])
    {:ok, caller}
  end

  @impl :gen_event
  def handle_call(_request, caller), do: {:ok, :ok, caller}
end
