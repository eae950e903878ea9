defmodule Bombus.Training.LoRA.Events do
  @moduledoc false
  # What a training reports: from Python, into training.jsonl, to whoever monitors, and as a curve.

  @file_name "training.jsonl"
  # How often it is looked for the last line after Python has gone, ten times a second.
  @patience 20
  @types %{
    "start" => :start,
    "train" => :train,
    "validation" => :validation,
    "checkpoint" => :checkpoint,
    "done" => :done,
    "error" => :error,
    "cancelled" => :cancelled
  }
  @fields ~w(iteration loss learning_rate iterations_per_second tokens_per_second trained_tokens
             peak_memory seconds path kind message module os_pid iterations reason)
  @keys Map.new(@fields, &{&1, String.to_atom(&1)})

  @doc "The file of events, with those of the first `done` iterations, where they were made here."
  def create(path, done) do
    kept = for %{iteration: iteration} = event <- read(path), iteration <= done, do: event

    with {:ok, file} <- File.open(Path.join(path, @file_name), [:write, :binary]) do
      if done > 0, do: Enum.each(kept, &append(file, &1))
      {:ok, file}
    end
  end

  def append(file, event) do
    # A full disk ends Python too, which says so.
    _ = :file.write(file, [JSON.encode_to_iodata!(event), ?\n])
  end

  @doc "The last line says how it ended."
  def finish(file, path, result) do
    append(file, last(result))
    File.close(file)
    draw(path)
  end

  defp last({:ok, path}), do: %{type: :done, path: path}
  defp last({:error, %{reason: :cancelled}}), do: %{type: :cancelled}
  defp last({:error, error}), do: %{type: :error, reason: error.reason, message: error.message}

  @spec decode(binary()) :: {:ok, map()} | :error
  def decode(line) do
    with {:ok, %{"type" => type} = event} when is_map_key(@types, type) <- JSON.decode(line) do
      fields = for {name, value} <- event, key = @keys[name], into: %{}, do: {key, value}
      {:ok, Map.put(fields, :type, @types[type])}
    else
      _other -> :error
    end
  end

  def read(path) do
    case File.read(Path.join(path, @file_name)) do
      {:ok, text} ->
        for line <- String.split(text, "\n"), {:ok, event} <- [decode(line)], do: event

      {:error, _reason} ->
        []
    end
  end

  @doc "The events of a training that runs or is over, as they come."
  def stream(path) do
    Stream.resource(
      fn -> %{file: Path.join(path, @file_name), place: 0, os_pid: nil, patience: @patience} end,
      &next/1,
      fn _state -> :ok end
    )
  end

  defp next(:over), do: {:halt, :over}

  defp next(state) do
    {events, place} = from(state.file, state.place)
    os_pid = Enum.find_value(events, state.os_pid, & &1[:os_pid])
    state = %{state | place: place, os_pid: os_pid}

    cond do
      Enum.any?(events, &(&1.type in [:done, :error, :cancelled])) -> {events, :over}
      events != [] -> {events, %{state | patience: @patience}}
      os_pid && alive?(os_pid) -> wait(state)
      os_pid && state.patience > 0 -> wait(%{state | patience: state.patience - 1})
      true -> {:halt, :over}
    end
  end

  defp wait(state) do
    Process.sleep(100)
    {[], state}
  end

  # The whole lines behind `place`.
  defp from(file, place) do
    with {:ok, text} when byte_size(text) > place <- File.read(file) do
      rest = binary_part(text, place, byte_size(text) - place)
      {lines, [partial]} = rest |> String.split("\n") |> Enum.split(-1)
      events = for line <- lines, {:ok, event} <- [decode(line)], do: event
      {events, place + byte_size(rest) - byte_size(partial)}
    else
      _nothing -> {[], place}
    end
  end

  @doc "Whether a process of the operating system is there."
  def alive?(os_pid) do
    match?({_output, 0}, System.cmd("kill", ["-0", "#{os_pid}"], stderr_to_stdout: true))
  end

  @width 720
  @height 360
  @margin 48

  @doc "The loss curve, `loss.svg`: both losses over the iterations."
  def draw(path) do
    events = for %{loss: loss} = event <- read(path), is_number(loss), do: event

    if events != [] do
      File.write(Path.join(path, "loss.svg"), svg(events))
    end
  end

  defp svg(events) do
    losses = Enum.map(events, & &1.loss)
    most = max(Enum.max(losses), 1.0e-6)
    last = events |> Enum.map(& &1.iteration) |> Enum.max() |> max(1)
    x = &round(@margin + &1 / last * (@width - 2 * @margin))
    y = &round(@height - @margin - &1 / most * (@height - 2 * @margin))

    line = fn type, color ->
      points =
        for %{type: ^type} = event <- events, do: "#{x.(event.iteration)},#{y.(event.loss)}"

      [
        "<polyline fill=\"none\" stroke=\"#{color}\" stroke-width=\"2\" points=\"",
        Enum.intersperse(points, " "),
        "\"/>\n"
      ]
    end

    label = fn x, y, anchor, text ->
      "<text x=\"#{x}\" y=\"#{y}\" text-anchor=\"#{anchor}\">#{text}</text>\n"
    end

    [
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"#{@width}\" height=\"#{@height}\" ",
      "font-family=\"sans-serif\" font-size=\"12\">\n",
      "<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
      "<path fill=\"none\" stroke=\"gray\" d=\"M#{@margin} #{@margin}V#{y.(0)}H#{x.(last)}\"/>\n",
      line.(:train, "#1f77b4"),
      line.(:validation, "#ff7f0e"),
      label.(@margin - 6, y.(0), "end", "0"),
      label.(@margin - 6, y.(most), "end", Float.round(most / 1, 2)),
      label.(x.(last), @height - @margin + 16, "end", "iteration #{last}"),
      label.(
        @width - @margin,
        @margin - 18,
        "end",
        "training loss (blue), validation loss (orange)"
      ),
      "</svg>\n"
    ]
  end
end
