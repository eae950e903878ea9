defmodule Mix.Tasks.Bombus.Train do
  @shortdoc "Trains a LoRA adapter with mlx_lm"

  @moduledoc """
  Trains a LoRA adapter with mlx_lm, in a Python beside the VM.

      mix bombus.train --model mlx-community/Qwen3-0.6B-4bit --data data --output adapters/my-posts
      mix bombus.train --model demo --texts posts.txt --prompt "Write a post" --output adapters/mine

  ## Options

    * `--model` (required) - a Hub id, a folder in MLX's format, or `demo`
    * `--output` (required) - the adapter's folder
    * `--data` - a folder with `train.jsonl` and `valid.jsonl`
    * `--texts` - in place of `--data`: a file of texts with a line `---` between them, from which
      the data is made, in the folder `data` of the output; `--prompt` is what they answer
      ("Write a post" by default)
    * `--resume` - goes on from the last checkpoint in the output; `--resume-from` from another one
    * `--overwrite` - trains another adapter in the place of the one that is in the output
    * `--iterations`, `--rank`, `--scale`, `--dropout`, `--fine-tune-type` (`lora` or `dora`),
      `--num-layers`, `--learning-rate`, `--batch-size`, `--grad-accumulation`,
      `--max-seq-length`, `--no-mask-prompt`, `--steps-per-report`, `--steps-per-eval`,
      `--save-every`, `--seed`, `--python` - as in `Bombus.Training.LoRA.train/1`
  """

  use Mix.Task

  alias Bombus.Training.LoRA
  alias Bombus.Training.LoRA.Folder
  alias Mix.Bombus.CommandLine

  @training [
    iterations: :integer,
    rank: :integer,
    scale: :float,
    dropout: :float,
    fine_tune_type: :string,
    num_layers: :integer,
    learning_rate: :float,
    batch_size: :integer,
    grad_accumulation: :integer,
    max_seq_length: :integer,
    mask_prompt: :boolean,
    steps_per_report: :integer,
    steps_per_eval: :integer,
    save_every: :integer,
    seed: :integer,
    python: :string,
    resume_from: :string,
    overwrite: :boolean
  ]
  @own [
    model: :string,
    output: :string,
    data: :string,
    texts: :string,
    prompt: :string,
    resume: :boolean
  ]

  @impl true
  def run(arguments) do
    CommandLine.run("bombus.train", arguments, @own ++ @training, &train/2)
  end

  defp train(_options, [word | _rest]), do: Mix.raise("expected only options, got: #{word}")

  defp train(options, []) do
    output = required(options, :output)
    model = model(required(options, :model))
    training = Keyword.take(options, Keyword.keys(@training))
    training = Keyword.replace_lazy(training, :fine_tune_type, &kind/1)
    resumed = if options[:resume], do: [resume_from: output], else: []
    Mix.Task.run("app.start")

    [
      base_model: model,
      training_data: data(options, output),
      output_path: output,
      on_progress: unless(IO.ANSI.enabled?(), do: &report/1)
    ]
    |> Keyword.merge(resumed)
    |> Keyword.merge(training)
    |> LoRA.train()
    |> Bombus.Error.unwrap!()
    |> then(&Mix.shell().info("The adapter is in #{&1}: Bombus.load_adapter(#{inspect(&1)})"))
  end

  defp required(options, key) do
    options[key] || Mix.raise("expected --#{key}: see mix help bombus.train")
  end

  defp model("demo"), do: :demo
  defp model(model), do: model

  defp kind("lora"), do: :lora
  defp kind("dora"), do: :dora
  defp kind(other), do: Mix.raise("expected --fine-tune-type to be lora or dora, got: #{other}")

  defp data(options, output) do
    case {options[:data], options[:texts]} do
      {nil, nil} -> Mix.raise("expected --data or --texts: see mix help bombus.train")
      {data, nil} -> data
      {nil, texts} -> prepare(texts, output, options)
      {_data, _texts} -> Mix.raise("expected --data or --texts, got both")
    end
  end

  # Nothing is written where a training would be refused.
  defp prepare(texts, output, options) do
    data = Path.join(output, "data")
    resumed? = options[:resume] || options[:resume_from]

    with :ok <- Folder.free(Path.expand(output), options[:overwrite] == true or !!resumed?),
         {:ok, text} <- File.read(texts),
         {:ok, report} <- prepared(text, data, Keyword.take(options, [:prompt])) do
      Mix.shell().info("#{report.train} texts to train with, #{report.valid} to check with")
      data
    else
      {:error, %Bombus.Error{reason: :no_valid_content}} ->
        Mix.raise("there is no text in #{texts}")

      {:error, %Bombus.Error{message: message}} ->
        Mix.raise(message)

      {:error, reason} ->
        Mix.raise("cannot read #{texts}: #{:file.format_error(reason)}")
    end
  end

  defp prepared(text, data, options) do
    text |> String.split(~r/^---\s*$/m) |> LoRA.prepare_data(data, options)
  end

  # A line an event, where there is no terminal for a bar.
  defp report(%{type: type, iteration: iteration, loss: loss}) do
    Mix.shell().info("iteration #{iteration}: #{type} loss #{loss}")
  end

  defp report(_event), do: :ok
end
