defmodule Bombus.Hub.Progress do
  @moduledoc false
  # How far a download is, for a function of the caller's or for a terminal.

  alias Bombus.Hub.Options

  # The rate is that of so many milliseconds.
  @window 5_000
  @moment 1_000
  @bar 20

  defstruct [:id, :show, :started, samples: [], drawn?: false]

  def new(id, on_progress) do
    %__MODULE__{id: id, show: on_progress || terminal(), started: now()}
  end

  # The standard error, where a person looks at it.
  defp terminal do
    disabled? = Options.flag("HF_HUB_DISABLE_PROGRESS_BARS")

    case disabled? || :io.columns(:standard_error) do
      true -> nil
      {:ok, columns} -> columns
      {:error, _reason} -> nil
    end
  end

  @doc "`received`: the bytes that came through the network, without those that were there"
  def update(%{show: nil} = progress, _bytes, _total, _received), do: progress

  def update(progress, bytes, total, received) do
    samples = [{now(), received} | progress.samples]
    {recent, _older} = Enum.split_while(samples, fn {time, _} -> now() - time < @window end)
    rate = rate(recent, progress.started)
    # What the first moments say is no rate yet.
    known? = now() - progress.started > @moment or bytes == total

    show(%{progress | samples: recent}, %{
      id: progress.id,
      bytes: bytes,
      total: total,
      rate: rate,
      remaining: if(known? and rate > 0, do: ceil((total - bytes) / rate))
    })
  end

  # Between the oldest and the newest; with a single one, since the start.
  defp rate([{time, received}], started), do: per_second(received, time - started)

  defp rate([{time, received} | _] = samples, _started) do
    {first, before} = List.last(samples)
    per_second(received - before, time - first)
  end

  defp per_second(bytes, milliseconds), do: bytes * 1000 / max(milliseconds, 1)

  defp show(%{show: fun} = progress, state) when is_function(fun) do
    fun.(state)
    progress
  end

  defp show(%{show: columns} = progress, state) do
    IO.write(:stderr, ["\r", state |> line() |> String.slice(0, columns - 1), "\e[K"])
    %{progress | drawn?: true}
  end

  @doc false
  def line(state) do
    part = if state.total > 0, do: state.bytes / state.total, else: 0.0
    done = trunc(part * @bar)
    bar = String.duplicate("#", done) <> String.duplicate("-", @bar - done)
    left = if state.remaining, do: ", #{time(state.remaining)} left", else: ""

    "#{state.id} [#{bar}] #{trunc(part * 100)}% of #{size(state.total)}, " <>
      "#{size(state.rate)}/s#{left}"
  end

  @doc "Makes room for a line of somebody else's."
  def clear(%{drawn?: drawn?}), do: if(drawn?, do: IO.write(:stderr, "\r\e[K"))

  @doc "The end of the bar's line, where one was begun."
  def finish(%{drawn?: drawn?}), do: if(drawn?, do: IO.write(:stderr, "\n"))

  defp time(seconds) when seconds >= 3600,
    do: "#{div(seconds, 3600)}:#{padded(rem(div(seconds, 60), 60))}:#{padded(rem(seconds, 60))}"

  defp time(seconds), do: "#{div(seconds, 60)}:#{padded(rem(seconds, 60))}"

  defp padded(number), do: String.pad_leading("#{number}", 2, "0")

  defp size(bytes) when bytes >= 1.0e9, do: "#{Float.round(bytes / 1.0e9, 2)} GB"
  defp size(bytes) when bytes >= 1.0e6, do: "#{Float.round(bytes / 1.0e6, 1)} MB"
  defp size(bytes) when bytes >= 1.0e3, do: "#{round(bytes / 1.0e3)} kB"
  defp size(bytes), do: "#{round(bytes)} bytes"

  defp now, do: System.monotonic_time(:millisecond)
end
