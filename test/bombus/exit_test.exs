defmodule Bombus.ExitTest do
  # A VM that ends while something is generated ends cleanly.
  use ExUnit.Case, async: true

  @moduletag timeout: 120_000
  @ends ["System.halt(0)", "System.stop(0); Process.sleep(:infinity)", ":ok"]

  test "in mid-generation, whichever way it ends" do
    model = Bombus.Fixtures.checkpoint("f32-untied")

    # So many at once that their threads are in each other's way.
    for(ending <- @ends, _try <- 1..4, do: ending)
    |> Task.async_stream(&assert_clean(&1, model), max_concurrency: 4, timeout: 120_000)
    |> Stream.run()
  end

  defp assert_clean(ending, model) do
    # One after another: what each backend leaves behind goes in its own order.
    script = """
    for device <- #{inspect(Bombus.Fixtures.devices())} do
      model = Bombus.load_model!(#{inspect(model)}, device: device)
      serving = Bombus.Serving.new(model, nil)

      for _ <- 1..4 do
        input = %{token_ids: [3, 1, 4, 1, 5], max_new_tokens: 500}
        spawn(fn -> Enum.each(1..100, fn _ -> Bombus.Serving.run(serving, input) end) end)
      end
    end

    Process.sleep(100)
    #{ending}
    """

    {output, status} = Bombus.Fixtures.elixir(script)
    assert status == 0, "#{ending} ended with status #{status}: #{output}"
  end
end
