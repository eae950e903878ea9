defmodule Bombus.GuidesTest do
  # The guides, followed literally: their Elixir and their shell commands, in their order.
  use ExUnit.Case

  @moduletag :tmp_dir
  @moduletag timeout: 300_000
  @python System.get_env("BOMBUS_PYTHON")
  @block ~r/^```(elixir|sh)\n(.*?)^```$/ms

  @tag skip: if(@python == nil, do: "BOMBUS_PYTHON names no Python with mlx_lm")
  test "fine_tuning.md", %{tmp_dir: dir} do
    guide = File.read!("guides/fine_tuning.md")
    blocks = Regex.scan(@block, guide, capture: :all_but_first)
    assert length(blocks) >= 6

    File.cd!(dir, fn ->
      Enum.reduce(blocks, [], fn
        ["elixir", code], bindings ->
          {_value, bindings} = Code.eval_string(code, bindings)
          bindings

        ["sh", command], bindings ->
          model = Application.app_dir(:bombus, "priv/models/demo")
          path = Path.dirname(@python) <> ":" <> System.get_env("PATH")
          env = [{"MODEL", model}, {"PATH", path}]
          {output, status} = System.cmd("sh", ["-ec", command], env: env, stderr_to_stdout: true)
          assert status == 0, output
          bindings
      end)
    end)
  end
end
