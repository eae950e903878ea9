defmodule Bombus.Training.LoRA.Rates do
  @moduledoc false
  # How fast models were trained on this machine: a file in the user's cache.

  def file, do: Path.join(:filename.basedir(:user_cache, "bombus"), "training_rates.json")

  @doc "Keeps the rate of a model, in iterations a second, if it can."
  def keep(model, rate) when is_number(rate) and rate > 0 do
    rates = Map.put(read(), model, rate)
    _ = File.mkdir_p(Path.dirname(file()))
    _ = File.write(file(), JSON.encode!(rates))
    :ok
  end

  def keep(_model, _rate), do: :ok

  def get(model), do: read()[model]

  defp read do
    with {:ok, text} <- File.read(file()),
         {:ok, %{} = rates} <- JSON.decode(text) do
      rates
    else
      _none -> %{}
    end
  end
end
