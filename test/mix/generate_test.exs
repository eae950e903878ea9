defmodule Mix.Tasks.Bombus.GenerateTest do
  use ExUnit.Case

  import ExUnit.CaptureIO

  alias Mix.Tasks.Bombus.Generate

  @prompt "Write a post about coffee"
  @demo Path.expand("../../priv/models", __DIR__)

  defp generate(arguments), do: capture_io(fn -> Generate.run(arguments) end)

  test "it writes to the terminal, with the demo model by default" do
    text = generate([@prompt])
    assert text =~ ~r/coffee/i
    assert text == generate(["--model", Path.join(@demo, "demo"), @prompt])
  end

  test "with an adapter, by folder and by name, and with options" do
    folder = [
      "--model",
      Path.join(@demo, "demo"),
      "--adapter",
      Path.join(@demo, "adapters/pirate")
    ]

    text = generate(folder ++ ["--max-new-tokens", "30", @prompt])
    assert text =~ ~r/\A(Ahoy|Arr)/
    assert text == generate(~w(--adapter pirate --max-new-tokens 30) ++ [@prompt])
    sampled = ~w(--temperature 0.8 --seed 4 --top-p 0.95 --top-k 40 --min-p 0.01) ++ [@prompt]
    assert generate(sampled) == generate(sampled)
  end

  test "mistakes are said in a line" do
    for {arguments, words} <- [
          {[], "expected one prompt"},
          {["a", "b"], "expected one prompt"},
          {["--temprature", "1", "a"], "temprature"},
          {["--temperature", "-1", "a"], "expected :temperature"},
          {["--model", "nowhere", "a"], "no folder"},
          {["--adapter", "poet", "a"], "poet"},
          {["--device", "tpu", "a"], "--device"}
        ] do
      raised = assert_raise Mix.Error, fn -> generate(arguments) end
      assert Exception.message(raised) =~ words
    end
  end
end
