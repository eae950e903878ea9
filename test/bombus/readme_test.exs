defmodule Bombus.ReadmeTest do
  use ExUnit.Case, async: true

  @readme Path.expand("../../README.md", __DIR__)

  test "its table of models has every family that is loaded, once" do
    named = for row <- rows("### Models"), name <- names(hd(row)), do: name
    assert Enum.sort(named) == Bombus.families()
    assert Bombus.families() == Enum.sort(Bombus.families())
  end

  # The cells of the first table behind a heading, without its head.
  defp rows(heading) do
    [_before, section] = @readme |> File.read!() |> String.split("\n#{heading}\n", parts: 2)

    section
    |> String.split("\n")
    |> Enum.drop_while(&(not String.starts_with?(&1, "|")))
    |> Enum.take_while(&String.starts_with?(&1, "|"))
    |> Enum.drop(2)
    |> Enum.map(&(&1 |> String.trim("|") |> String.split("|")))
  end

  defp names(cell), do: for([_all, name] <- Regex.scan(~r/`([^`]+)`/, cell), do: name)
end
