defmodule Mix.Tasks.Bombus.Info do
  @shortdoc "Says what a model is, and whether it loads, without its weights"

  @moduledoc """
  Says what a model is: its family, layers and parameters, the bits of its weights, the context, the
  memory that it will take, how this device computes it, and what is missing.

      mix bombus.info models/Qwen3-0.6B-4bit
      mix bombus.info mlx-community/Qwen3-8B-4bit

  Its weights are not loaded. Of a model of the Hub only the configuration and the headers of its files
  are downloaded. The exit status is 1 where the model would not load; the last lines then say why.

  The word is a folder in MLX's format, a Hub id (`owner/name`), or `demo`, the model that ships with
  Bombus.

  ## Options

    * `--device` - `auto` (default), `gpu` or `cpu`: what the model is to run on
    * `--revision` - a branch, a tag or a commit's hash of a Hub id
    * `--subdir` - the folder within its repository
  """

  use Mix.Task

  alias Bombus.{Error, Model, Source}
  alias Mix.Bombus.{CommandLine, Generation, ModelInfo}

  @switches [device: :string, revision: :string, subdir: :string]

  @impl true
  def run(arguments), do: CommandLine.run("bombus.info", arguments, @switches, &info/2)

  defp info(options, [word]) do
    device = Generation.device(options[:device] || "auto")

    source =
      word |> Source.from_word() |> with_options(Keyword.take(options, [:revision, :subdir]))

    # What reads files needs no running application.
    Mix.Task.run("app.config")
    info = source |> Model.Info.read(device: device) |> Error.unwrap!()
    info |> ModelInfo.lines() |> Enum.each(&IO.puts/1)
    unless info.problems == [], do: exit({:shutdown, 1})
  end

  defp info(_options, _words) do
    Mix.raise("expected one model: mix bombus.info FOLDER, or owner/name, or demo")
  end

  defp with_options(source, []), do: source
  defp with_options({:hf, id}, options), do: {:hf, id, options}

  defp with_options(source, [{key, _value} | _options]) do
    switch = CommandLine.switch(key)
    Mix.raise("#{switch} is for a Hub id, and #{Source.name(source)} is a folder")
  end
end
