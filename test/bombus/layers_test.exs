defmodule Bombus.LayersTest do
  use ExUnit.Case, async: true

  alias Bombus.ModuleUses

  @lib Path.expand("../../lib", __DIR__)
  @layers @lib |> Path.join("layers.exs") |> Code.eval_file() |> elem(0)
  @place @layers |> Enum.with_index() |> Map.new()

  test "every module of lib has one place in the order" do
    assert Enum.sort(@layers) == Enum.sort(for {module, _used} <- sources(), do: module)
    assert @layers == Enum.uniq(@layers)
  end

  test "no module uses one that stands below it" do
    upwards =
      for {module, used} <- sources(),
          other <- used,
          is_map_key(@place, other) and @place[other] > @place[module],
          do: "#{inspect(module)} uses #{inspect(other)}, which stands below it"

    assert upwards == []
  end

  test "names are read in every way that they can be written" do
    source = ~S"""
    defmodule Mine do
      alias First.{Second, Third}
      alias Fourth.Fifth
      alias Sixth.Seventh, as: Other
      @spec fun(Only.A.Type.t()) :: term()
      @table [one: [type_spec: quote(do: Only.A.Type.t())]]
      def fun(%Second{}), do: {Fifth, Other.call(&Third.Deeper.fun/1), Alone.call()}
    end
    """

    assert {Mine, used} = ModuleUses.of(source)

    assert Enum.sort(used -- [Mine]) ==
             [Alone, First.Second, First.Third.Deeper, Fourth.Fifth, Sixth.Seventh]
  end

  defp sources do
    for path <- Path.wildcard(Path.join(@lib, "**/*.ex")),
        do: path |> File.read!() |> ModuleUses.of()
  end
end
