defmodule Mix.Tasks.Bombus.Generate do
  @shortdoc "Writes text with a model, to the terminal"

  @moduledoc """
  Writes text with a model, to the terminal as it comes.

      mix bombus.generate "Write a post about coffee"
      mix bombus.generate --model DIR --adapter DIR --temperature 0.8 "Write a post about coffee"
      mix bombus.generate --model mlx-community/Qwen3-0.6B-4bit "Write a post about coffee"
      mix bombus.generate - < prompt.txt

  Where the prompt is `-`, all of the standard input is the prompt. `mix bombus.chat` has conversations.

  ## Options

    * `--model` - a folder in MLX's format, a Hub id (`owner/name`), or `demo`, the model that ships with
      Bombus (default)
    * `--tokenizer` - a folder with `tokenizer.json`, or a Hub id; the model's by default
    * `--adapter` - a folder with a LoRA adapter, a Hub id, or the name of one of the demo model's
    * `--scale` - takes the place of the adapter's scale
    * `--device` - `auto` (default), `gpu` or `cpu`
    * `--max-new-tokens`, `--temperature`, `--top-k`, `--top-p`, `--min-p`,
      `--repetition-penalty`, `--seed`, `--stop` - as in `Bombus.Serving`
    * `--no-thinking` - tells the chat template not to let the model think (`enable_thinking: false`)
    * `--template-option name=value` - another option of the chat template; the value is JSON or a text.
      May be given more than once
    * `--no-chat-template` - completes the text as it stands
  """

  use Mix.Task

  alias Mix.Bombus.{CommandLine, Generation}

  @switches Generation.switches() ++ [chat_template: :boolean]

  @impl true
  def run(arguments) do
    CommandLine.run("bombus.generate", arguments, @switches, &generate/2)
  end

  defp generate(options, words) do
    Generation.check!(options)
    prompt = prompt(words)
    Mix.Task.run("app.start")
    serving = Generation.serving!(options)
    input = %{text: prompt, adapter: adapter(options)}
    serving |> Bombus.Serving.stream(input) |> Enum.each(&IO.write/1)
    IO.puts("")
  end

  defp prompt(["-"]) do
    case IO.read(:stdio, :eof) do
      text when is_binary(text) -> String.replace_suffix(text, "\n", "")
      :eof -> Mix.raise("expected a prompt on the standard input, it is empty")
      {:error, _reason} -> Mix.raise("expected the standard input to be text in UTF-8")
    end
  end

  defp prompt([prompt]), do: prompt
  defp prompt(_other), do: Mix.raise("expected one prompt: mix bombus.generate \"Write a post\"")

  defp adapter(options) do
    if word = options[:adapter] do
      word
      |> Generation.adapter_source(options[:model] || "demo")
      |> Bombus.load_adapter!(Keyword.take(options, [:scale]))
    end
  end
end
