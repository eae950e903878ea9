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

  test "with a prompt from the standard input" do
    assert capture_io(@prompt <> "\n", fn -> Generate.run(["-"]) end) == generate([@prompt])

    for {input, words} <- [{"", "empty"}, {"\n", "empty"}] do
      raised = assert_raise Mix.Error, fn -> capture_io(input, fn -> Generate.run(["-"]) end) end
      assert Exception.message(raised) =~ words
    end
  end

  @tag :tmp_dir
  test "with options of the chat template", %{tmp_dir: dir} do
    folder = Bombus.Fixtures.copy(Path.join(@demo, "demo"), dir)
    template = "{{ messages[0].content }}{{ enable_thinking }}{{ a }}"
    File.write!(Path.join(folder, "chat_template.jinja"), template)
    {model, tokenizer} = {Bombus.load_model!(folder), Bombus.load_tokenizer!(folder)}

    for {switches, options} <- [
          {~w(--no-thinking), %{enable_thinking: false}},
          {~w(--thinking --template-option a=[1,"2"]), %{enable_thinking: true, a: [1, "2"]}},
          {~w(--template-option a=b=c), %{a: "b=c"}}
        ] do
      options = [max_new_tokens: 5, template_options: options]
      serving = Bombus.Serving.new(model, tokenizer, options)
      %{results: [%{text: text}]} = Bombus.Serving.run(serving, @prompt)
      switches = ["--max-new-tokens", "5", "--tokenizer", folder | switches]
      assert generate(switches ++ [@prompt]) == text <> "\n"
    end
  end

  test "each task writes its help" do
    for {task, words} <- [
          {Generate, "--no-chat-template"},
          {Mix.Tasks.Bombus.Train, "--learning-rate"},
          {Mix.Tasks.Bombus.Download, "--cache-dir"},
          {Mix.Tasks.Bombus.Chat, "--system"}
        ],
        arguments <- [["--help"], ["-h"], ["--model", "demo", "--help"]] do
      assert capture_io(fn -> task.run(arguments) end) =~ words
    end

    # Behind -- it is a text.
    assert generate(["--max-new-tokens", "3", "--", "--help"]) != ""
  end

  test "mistakes are said in a line" do
    for {arguments, words} <- [
          {[], "expected one prompt"},
          {["a", "b"], "expected one prompt"},
          {["--temprature", "1", "a"],
           "unknown option --temprature, did you mean --temperature?"},
          {["--max-tokens", "1", "a"], "did you mean --max-new-tokens?"},
          {["--xyz", "a"], "mix bombus.generate takes --model"},
          {["-t", "a"], "unknown option -t"},
          {["--temperature", "warm", "a"], "expected --temperature to be a number, got: warm"},
          {["--top-k", "1.5", "a"], "expected --top-k to be a whole number, got: 1.5"},
          {["a", "--top-k"], "expected a value behind --top-k"},
          {["--scale", "2", "a"], "expected --adapter beside --scale"},
          {["--template-option", "x", "a"], "--template-option name=value"},
          {["--temperature", "-1", "a"], "expected :temperature"},
          {["--model", "nowhere", "a"], "no folder"},
          {["--adapter", "poet", "a"], "no demo adapter \"poet\""},
          {["--adapter", "./poet", "a"], "no folder"},
          {["--adapter", "some/where/else", "a"], "no folder"},
          {["--adapter", "0000001_adapters.safetensors", "a"], "no folder"},
          {["--device", "tpu", "a"], "--device"}
        ] do
      raised = assert_raise Mix.Error, fn -> generate(arguments) end
      assert Exception.message(raised) =~ words
    end
  end
end
