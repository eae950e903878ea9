defmodule Bombus.ParityTest do
  # The rule is the one of native/bombus/tests/parity.rs; this is the same way as a user goes.
  use ExUnit.Case, async: true

  alias Bombus.{Fixtures, Serving}

  for name <- Fixtures.cases() do
    test "#{name} scores and continues as mlx-lm does" do
      for device <- Fixtures.devices(), do: check(unquote(name), device)
    end
  end

  defp check(name, device) do
    expected = Fixtures.expected(name)
    model = Bombus.load_model!({:local, Fixtures.checkpoint(name)}, device: device)
    assert model.device == device
    serving = Serving.new(model, nil, max_new_tokens: 16)

    for {run, reference} <- expected["runs"] do
      adapter = adapter(name, run)
      {:ok, scored} = Bombus.score(model, expected["token_ids"], adapter: adapter)
      assert_close(expected["dtype"], scored, reference, "#{inspect(device)} #{name} #{run}")

      input = %{token_ids: expected["greedy_prompt"], adapter: adapter}
      %{results: [%{token_ids: greedy}]} = Serving.run(serving, input)
      assert_continues(greedy, reference, expected["eos_token_ids"])
    end
  end

  defp adapter(_name, "base"), do: nil

  defp adapter(name, "adapter:" <> adapter) do
    Bombus.load_adapter!({:local, Fixtures.adapter(name, adapter)})
  end

  defp assert_close("float32", scored, reference, run) do
    worst = scored |> distances(reference["logprobs"]) |> Enum.max()
    assert worst <= 1.0e-3, "#{run}: #{worst} from mlx-lm"
  end

  defp assert_close(_dtype, scored, reference, run) do
    to_mlx = mean(scored, reference["logprobs"])
    own = mean(scored, reference["exact"])
    its = mean(reference["logprobs"], reference["exact"])

    assert to_mlx <= 0.02 or own <= 1.25 * its + 0.01,
           "#{run}: #{to_mlx} from mlx-lm, #{own} from the exact answer (mlx-lm: #{its})"
  end

  defp assert_continues(greedy, reference, eos) do
    agreed = Enum.take(reference["greedy"], reference["greedy_agreed"])
    until_eos = Enum.take_while(agreed, &(&1 not in eos))
    assert Enum.take(greedy, length(until_eos)) == until_eos
    if length(until_eos) < length(agreed), do: assert(greedy == until_eos)
  end

  defp mean(one, other) do
    distances = distances(one, other)
    Enum.sum(distances) / length(distances)
  end

  defp distances(one, other) do
    assert length(one) == length(other)
    Enum.zip_with(one, other, &abs(&1 - &2))
  end
end
