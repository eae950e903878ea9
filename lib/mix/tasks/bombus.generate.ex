defmodule Mix.Tasks.Bombus.Generate do
  @shortdoc "Writes text with a model, to the terminal"

  @moduledoc """
  Writes text with a model, to the terminal as it comes.

      mix bombus.generate "Write a post about coffee"
      mix bombus.generate --model DIR --adapter DIR --temperature 0.8 "Write a post about coffee"
      mix bombus.generate --model mlx-community/Qwen3-0.6B-4bit "Write a post about coffee"

  ## Options

    * `--model` - a folder in MLX's format, a Hub id (`owner/name`), or `demo`, the model that ships with
      Bombus (default)
    * `--tokenizer` - a folder with `tokenizer.json`, or a Hub id; the model's by default
    * `--adapter` - a folder with a LoRA adapter, a Hub id, or the name of one of the demo model's
    * `--scale` - takes the place of the adapter's scale
    * `--device` - `auto` (default), `gpu` or `cpu`
    * `--max-new-tokens`, `--temperature`, `--top-k`, `--top-p`, `--min-p`,
      `--repetition-penalty`, `--seed`, `--stop` - as in `Bombus.Serving`
    * `--no-chat-template` - completes the text as it stands
  """

  use Mix.Task

  alias Bombus.Source

  @switches [
    model: :string,
    tokenizer: :string,
    adapter: :string,
    scale: :float,
    device: :string,
    max_new_tokens: :integer,
    temperature: :float,
    top_k: :integer,
    top_p: :float,
    min_p: :float,
    repetition_penalty: :float,
    seed: :integer,
    stop: :keep,
    chat_template: :boolean
  ]
  @generation ~w(max_new_tokens temperature top_k top_p min_p repetition_penalty seed chat_template)a

  @impl true
  def run(arguments) do
    {options, prompt} = parse(arguments)
    Mix.Task.run("app.start")

    try do
      options |> serving() |> Bombus.Serving.stream(prompt) |> Enum.each(&IO.write/1)
      IO.puts("")
    rescue
      error in [Bombus.Error, ArgumentError] -> Mix.raise(Exception.message(error))
    end
  end

  defp parse(arguments) do
    case OptionParser.parse!(arguments, strict: @switches) do
      {options, [prompt]} -> {options, prompt}
      {_options, _other} -> Mix.raise("expected one prompt: mix bombus.generate \"Write a post\"")
    end
  rescue
    error in OptionParser.ParseError -> Mix.raise(Exception.message(error))
  end

  defp serving(options) do
    model = Source.from_word(options[:model] || "demo")
    tokenizer = Source.from_word(options[:tokenizer] || options[:model] || "demo")

    generation =
      Keyword.take(options, @generation) ++
        [adapter: adapter(options, model), stop: Keyword.get_values(options, :stop)]

    model
    |> Bombus.load_model!(device: device(options[:device] || "auto"))
    |> Bombus.Serving.new(Bombus.load_tokenizer!(tokenizer), generation)
  end

  defp adapter(options, model) do
    if name = options[:adapter] do
      named? = model == :demo and not File.dir?(name)
      source = if named?, do: {:demo, name}, else: Source.from_word(name)
      Bombus.load_adapter!(source, Keyword.take(options, [:scale]))
    end
  end

  defp device("auto"), do: :auto
  defp device("gpu"), do: :gpu
  defp device("cpu"), do: :cpu
  defp device(other), do: Mix.raise("expected --device to be auto, gpu or cpu, got: #{other}")
end
