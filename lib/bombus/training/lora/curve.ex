defmodule Bombus.Training.LoRA.Curve do
  @moduledoc false
  # The loss curve, `loss.svg`: both losses over the iterations.

  alias Bombus.Training.LoRA.Events

  @width 720
  @height 360
  @margin 48

  @doc "Draws the curve of the training that is told of in the file `events`."
  def draw(path, events) do
    events = for %{loss: loss} = event <- Events.read(events), is_number(loss), do: event

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
