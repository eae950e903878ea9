defmodule Bombus.Training.LoRA.Events do
  @moduledoc false
  # What a training reports: from Python, into training.jsonl.

  alias Bombus.Training.LoRA.Folder

  @types %{
    "start" => :start,
    "begun" => :begun,
    "warning" => :warning,
    "train" => :train,
    "validation" => :validation,
    "checkpoint" => :checkpoint,
    "done" => :done,
    "error" => :error,
    "cancelled" => :cancelled
  }
  @fields ~w(iteration loss learning_rate iterations_per_second tokens_per_second trained_tokens
             peak_memory seconds path kind message module os_pid iterations reason warnings)
  @keys Map.new(@fields, &{&1, String.to_atom(&1)})

  @doc "A file of events for a training, with those of its first `done` iterations, where they were made here."
  def create(path, done) do
    kept =
      for %{iteration: iteration} = event <- read(Folder.events(path)),
          iteration <= done,
          do: event

    with {:ok, file} <- File.open(Folder.starting_events(path), [:write, :exclusive, :binary]) do
      if done > 0, do: Enum.each(kept, &append(file, &1))
      {:ok, file}
    end
  end

  def append(file, event) do
    # A full disk ends Python too, which says so.
    _ = :file.write(file, [JSON.encode_to_iodata!(event), ?\n])
  end

  @doc "The last line says how it ended."
  def finish(file, result, warnings) do
    append(file, last(result, warnings))
    File.close(file)
  end

  defp last({:ok, path}, []), do: %{type: :done, path: path}
  defp last({:ok, path}, warnings), do: %{type: :done, path: path, warnings: warnings}
  defp last({:error, %{reason: :cancelled}}, _warnings), do: %{type: :cancelled}

  defp last({:error, error}, _warnings),
    do: %{type: :error, reason: error.reason, message: error.message}

  @spec decode(binary()) :: {:ok, map()} | :error
  def decode(line) do
    with {:ok, %{"type" => type} = event} when is_map_key(@types, type) <- JSON.decode(line) do
      fields = for {name, value} <- event, key = @keys[name], into: %{}, do: {key, value}
      {:ok, Map.put(fields, :type, @types[type])}
    else
      _other -> :error
    end
  end

  @doc "The events in a file, none where there is no file."
  def read(file) do
    case File.read(file) do
      {:ok, text} -> lines(text)
      {:error, _reason} -> []
    end
  end

  @doc "The events of whole lines."
  def lines(text),
    do: for(line <- String.split(text, "\n"), {:ok, event} <- [decode(line)], do: event)

  @doc "Whether an event is the last of its training."
  def last?(event), do: event.type in [:done, :error, :cancelled]

  @doc "Whether a process of the operating system is there."
  def alive?(os_pid) do
    match?({_output, 0}, System.cmd("kill", ["-0", "#{os_pid}"], stderr_to_stdout: true))
  end
end
