defmodule Mix.Tasks.Compile.BombusNativeTest do
  use ExUnit.Case, async: true

  alias Mix.Tasks.Compile.BombusNative

  @moduletag :tmp_dir
  @native Path.expand("../../native", __DIR__)
  @built ~N[2026-01-01 12:00:00]
  @edited ~N[2026-01-01 12:00:01]

  # The workspace of this project, with files as old as the library.
  setup %{tmp_dir: dir} do
    patterns = ~w(Cargo.* */Cargo.toml */build.rs */{src,cpp}/**/*.*)
    sources = Enum.flat_map(patterns, &Path.wildcard(Path.join(@native, &1)))
    names = for source <- sources, do: Path.relative_to(source, @native)
    library = Path.join(dir, "bombus_nif.so")
    for path <- [library | Enum.map(names, &Path.join(dir, &1))], do: touch(path, @built)
    %{names: names, library: library}
  end

  test "every kind of source is watched", %{tmp_dir: dir, names: names, library: library} do
    refute BombusNative.stale?(dir, library)
    kinds = Enum.group_by(names, &Path.extname/1)
    assert [] = ~w(.cu .cuh .rs .toml .lock .cpp) -- Map.keys(kinds)

    for {_kind, names} <- kinds, name <- [hd(names), List.last(names)] do
      path = Path.join(dir, name)
      touch(path, @edited)
      assert BombusNative.stale?(dir, library), "an edit of #{name} is not seen"
      touch(path, @built)
    end
  end

  test "a library that is not there is stale", %{tmp_dir: dir, library: library} do
    File.rm!(library)
    assert BombusNative.stale?(dir, library)
  end

  defp touch(path, time) do
    File.mkdir_p!(Path.dirname(path))
    File.touch!(path, NaiveDateTime.to_erl(time))
  end
end
