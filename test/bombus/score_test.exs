defmodule Bombus.ScoreTest do
  use ExUnit.Case, async: true

  alias Bombus.{Error, Fixtures}

  defp load(options) do
    Bombus.load_model!(Fixtures.checkpoint("f32-untied"), [device: :cpu] ++ options)
  end

  test "a text is no longer than the model's :max_context" do
    model = load(max_context: 9)
    assert {:ok, logprobs} = Bombus.score(model, Enum.to_list(1..9))
    assert length(logprobs) == 8

    assert {:error, %Error{reason: :prompt_too_long} = error} =
             Bombus.score(model, Enum.to_list(1..10))

    assert error.message =~ "10 tokens, where the context is 9"
  end

  test "one that takes too long ends with :timeout" do
    model = load(prefill_chunk: 1)
    ids = for place <- 0..499, do: rem(place * 37, 256)
    assert {:error, %Error{reason: :timeout}} = Bombus.score(model, ids, timeout: 1)
    assert {:ok, [_ | _]} = Bombus.score(model, ids, timeout: :infinity)
    assert {:ok, [_ | _]} = Bombus.score(model, ids, timeout: 60_000)
    assert_raise ArgumentError, ~r/:timeout/, fn -> Bombus.score(model, ids, timeout: -1) end
  end
end
