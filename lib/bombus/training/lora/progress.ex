defmodule Bombus.Training.LoRA.Progress do
  @moduledoc false
  # A bar in the terminal, where there is one.

  @width 30

  def bar(iterations) do
    if IO.ANSI.enabled?(), do: &draw(&1, iterations), else: fn _event -> :ok end
  end

  defp draw(%{type: :train} = event, iterations) do
    IO.write(:stderr, "\r" <> line(event, iterations) <> "\e[K")
    if event.iteration >= iterations, do: IO.write(:stderr, "\n")
  end

  defp draw(%{type: :validation} = event, _iterations) do
    IO.write(:stderr, "\rvalidation loss #{loss(event)} behind #{event.iteration}\e[K\n")
  end

  defp draw(_event, _iterations), do: :ok

  @doc "One line: how far, how long, how well."
  def line(event, iterations) do
    done = round(@width * min(event.iteration / iterations, 1))
    bar = String.duplicate("=", done) <> String.duplicate(" ", @width - done)

    "[#{bar}] #{event.iteration}/#{iterations}  loss #{loss(event)}  " <>
      "#{round(event.tokens_per_second || 0)} tokens/s  #{left(event, iterations)}"
  end

  defp loss(%{loss: loss}) when is_number(loss),
    do: :erlang.float_to_binary(loss / 1, decimals: 3)

  defp loss(_event), do: "?"

  defp left(%{iterations_per_second: rate} = event, iterations)
       when is_number(rate) and rate > 0 do
    seconds = round((iterations - event.iteration) / rate)
    "#{div(seconds, 60)} min #{rem(seconds, 60)} s left"
  end

  defp left(_event, _iterations), do: ""
end
