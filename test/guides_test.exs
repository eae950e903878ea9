defmodule Bombus.GuidesTest do
  # The guides, followed literally: their Elixir and their shell commands, in their order.
  use ExUnit.Case

  @moduletag :tmp_dir
  @moduletag timeout: 300_000
  @python System.get_env("BOMBUS_PYTHON")
  @block ~r/^```(elixir|sh)\n(.*?)^```$/ms

  @tag skip: if(@python == nil, do: "BOMBUS_PYTHON names no Python with mlx_lm")
  test "fine_tuning.md", %{tmp_dir: dir} do
    assert follow("fine_tuning.md", dir) >= 6
  end

  test "serving.md", %{tmp_dir: dir} do
    written = ExUnit.CaptureIO.capture_io(fn -> assert follow("serving.md", dir) >= 5 end)
    assert written =~ ~r/tea/i
  end

  @tag :nx
  test "bumblebee.md", %{tmp_dir: dir} do
    assert follow("bumblebee.md", dir) >= 3
  end

  # -> how many blocks there are
  defp follow(guide, dir) do
    blocks =
      Regex.scan(@block, File.read!(Path.join("guides", guide)), capture: :all_but_first)

    File.cd!(dir, fn ->
      Enum.reduce(blocks, [], fn
        ["elixir", code], bindings ->
          {_value, bindings} = Code.eval_string(code, bindings)
          bindings

        ["sh", command], bindings ->
          shell(command)
          bindings
      end)
    end)

    length(blocks)
  end

  defp shell(command) do
    model = Application.app_dir(:bombus, "priv/models/demo")
    path = Path.dirname(@python) <> ":" <> System.get_env("PATH")
    env = [{"MODEL", model}, {"PATH", path}]
    {output, status} = System.cmd("sh", ["-ec", command], env: env, stderr_to_stdout: true)
    assert status == 0, output
  end
end
