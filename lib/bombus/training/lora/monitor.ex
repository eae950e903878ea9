defmodule Bombus.Training.LoRA.Monitor do
  @moduledoc false
  # The events of a training that is about to begin, runs or is over, as they come.

  alias Bombus.Error
  alias Bombus.Training.LoRA.{Events, Folder}

  # Milliseconds from one look at the file to the next.
  @interval 100
  # How often it is looked for the last line after Python has gone.
  @patience 20

  @spec stream(Path.t(), timeout()) :: Enumerable.t()
  def stream(path, timeout) do
    start = fn -> %{path: path, deadline: deadline(timeout), file: nil, owner: self()} end
    Stream.resource(start, &next/1, &close/1)
  end

  defp deadline(:infinity), do: :infinity
  defp deadline(timeout), do: now() + timeout
  defp now, do: System.monotonic_time(:millisecond)

  defp next(:over), do: {:halt, :over}

  # Only the process that has opened a file can read it.
  defp next(%{owner: owner}) when owner != self() do
    raise ArgumentError,
          "expected a stream to be read by the process that began it, #{inspect(owner)}, " <>
            "got: #{inspect(self())}"
  end

  defp next(%{file: nil} = state) do
    case open(state.path) do
      {:ok, file} ->
        {[], Map.merge(state, %{file: file, partial: "", os_pid: nil, patience: @patience})}

      :none ->
        if state.deadline != :infinity and now() >= state.deadline, do: raise(nothing(state.path))
        wait(state)
    end
  end

  defp next(state) do
    {events, state} = read(state)
    state = %{state | os_pid: Enum.find_value(events, state.os_pid, & &1[:os_pid])}
    told = Enum.reject(events, &(&1.type in [:begun, :warning]))

    cond do
      Enum.any?(events, &Events.last?/1) -> {told, over(state)}
      events != [] -> {told, %{state | patience: @patience}}
      state.os_pid && Events.alive?(state.os_pid) -> wait(state)
      state.patience > 0 -> wait(%{state | patience: state.patience - 1})
      true -> {:halt, state}
    end
  end

  defp wait(state) do
    Process.sleep(@interval)
    {[], state}
  end

  # The file stays the training's own also where it gets its name, or is removed.
  defp open(path) do
    cond do
      starting?(path) -> open_file(Folder.starting_events(path))
      not running?(Folder.events(path)) and Folder.training?(path) -> :none
      true -> open_file(Folder.events(path))
    end
  end

  defp open_file(file) do
    with {:error, _reason} <- :file.open(file, [:read, :raw, :binary]), do: :none
  end

  # What a VM that was killed has left there does not count.
  defp starting?(path) do
    file = Folder.starting_events(path)
    File.exists?(file) and (Folder.training?(path) or running?(file))
  end

  defp running?(file) do
    events = Events.read(file)
    os_pid = Enum.find_value(events, & &1[:os_pid])
    os_pid != nil and not Enum.any?(events, &Events.last?/1) and Events.alive?(os_pid)
  end

  # The events of the whole lines that have come.
  defp read(state) do
    case :file.read(state.file, 1_000_000) do
      {:ok, bytes} ->
        {lines, [partial]} = (state.partial <> bytes) |> String.split("\n") |> Enum.split(-1)
        {lines |> Enum.join("\n") |> Events.lines(), %{state | partial: partial}}

      _end ->
        {[], state}
    end
  end

  defp over(state) do
    close(state)
    :over
  end

  defp close(%{file: file, owner: owner}) when file != nil and owner == self(),
    do: :file.close(file)

  defp close(_state), do: :ok

  defp nothing(path) do
    {:error, error} =
      Error.error(
        :not_found,
        "nothing trains at `#{path}`: start Bombus.Training.LoRA.train/1 with this output_path, " <>
          "or give monitor_training/2 a longer :timeout"
      )

    error
  end
end
