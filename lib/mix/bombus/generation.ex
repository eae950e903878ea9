defmodule Mix.Bombus.Generation do
  @moduledoc false
  # The options of the tasks that generate text: a model, its tokenizer, adapters, sampling.

  alias Bombus.{Serving, Source}

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
    thinking: :boolean,
    template_option: :keep
  ]
  @sampling ~w(max_new_tokens temperature top_k top_p min_p repetition_penalty seed chat_template)a

  def switches, do: @switches

  @doc "Raises where `--scale` has no adapter that it could be the scale of."
  def check!(options) do
    if options[:scale] && !options[:adapter],
      do: Mix.raise("expected --adapter beside --scale, which is an adapter's")

    options
  end

  @doc "A serving with the model, the tokenizer and the sampling of the options."
  def serving!(options) do
    word = options[:model] || "demo"
    device = device(options[:device] || "auto")
    model = Bombus.load_model!(Source.from_word(word), device: device)
    tokenizer = Bombus.load_tokenizer!(Source.from_word(options[:tokenizer] || word))
    Serving.new(model, tokenizer, sampling(options))
  end

  defp sampling(options) do
    Keyword.take(options, @sampling) ++
      [stop: Keyword.get_values(options, :stop), template_options: template_options(options)]
  end

  # JSON where it is some, else a text.
  defp template_options(options) do
    thinking =
      if options[:thinking] == nil, do: [], else: [{"enable_thinking", options[:thinking]}]

    for word <- Keyword.get_values(options, :template_option), into: Map.new(thinking) do
      case String.split(word, "=", parts: 2) do
        [name, value] -> {name, json(value)}
        [_name] -> Mix.raise("expected --template-option name=value, got: #{word}")
      end
    end
  end

  defp json(value) do
    case JSON.decode(value) do
      {:ok, decoded} -> decoded
      {:error, _reason} -> value
    end
  end

  @doc """
  The source of an adapter: one of the demo model's by its name alone, else a folder, a file or a
  Hub id.
  """
  def adapter_source(word, model_word) do
    if model_word == "demo" and word =~ ~r/^[\w-]+$/ and not File.exists?(word),
      do: {:demo, word},
      else: Source.from_word(word)
  end

  @doc "An adapter of the command line as `{name, word}`: `name=word`, or a word that is named after its end."
  def named(word) do
    case Regex.run(~r/^([\w-]+)=(.+)$/s, word) do
      [_all, name, word] -> {name, word}
      nil -> {word |> Path.basename() |> Path.rootname(".safetensors"), word}
    end
  end

  @doc "The names of the adapters that ship with the demo model, where that is the model."
  def demo_adapters("demo"), do: File.ls!(Application.app_dir(:bombus, "priv/models/adapters"))
  def demo_adapters(_other), do: []

  @doc "What `--device` names."
  def device("auto"), do: :auto
  def device("gpu"), do: :gpu
  def device("cpu"), do: :cpu
  def device(other), do: Mix.raise("expected --device to be auto, gpu or cpu, got: #{other}")
end
