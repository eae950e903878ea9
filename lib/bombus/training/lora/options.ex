defmodule Bombus.Training.LoRA.Options do
  @moduledoc false
  # What `train` is told, and what mlx_lm is told of it.

  alias Bombus.{Error, Source}

  @required [:base_model, :training_data, :output_path]
  @defaults [
    iterations: 1000,
    rank: 8,
    scale: 20.0,
    learning_rate: 1.0e-5,
    batch_size: 1,
    grad_accumulation: 8,
    max_seq_length: 256,
    save_every: 100,
    num_layers: :all,
    steps_per_report: 10,
    steps_per_eval: 200,
    seed: 0,
    dropout: 0.0,
    mask_prompt: true,
    fine_tune_type: :lora,
    resume_from: nil,
    python: nil,
    on_progress: nil
  ]
  @positive [
    :iterations,
    :rank,
    :batch_size,
    :grad_accumulation,
    :max_seq_length,
    :save_every,
    :steps_per_report,
    :steps_per_eval
  ]

  def validate!(options) do
    options = Keyword.validate!(options, @required ++ @defaults)

    for key <- @required, options[key] in [nil, ""] do
      raise ArgumentError, "expected #{inspect(key)} to be given, it is required"
    end

    for key <- @positive,
        do: check!(options, key, "a whole number above 0", &(is_integer(&1) and &1 > 0))

    check!(options, :scale, "a number", &is_number/1)
    check!(options, :learning_rate, "a number above 0", &(is_number(&1) and &1 > 0))

    check!(
      options,
      :dropout,
      "a number in 0..1, below 1",
      &(is_number(&1) and &1 >= 0 and &1 < 1)
    )

    check!(options, :seed, "a whole number", &(is_integer(&1) and &1 >= 0))
    check!(options, :mask_prompt, "true or false", &is_boolean/1)
    check!(options, :fine_tune_type, ":lora or :dora", &(&1 in [:lora, :dora]))

    check!(
      options,
      :num_layers,
      ":all or a whole number above 0",
      &(&1 == :all or (is_integer(&1) and &1 > 0))
    )

    check!(options, :on_progress, "a function of one event", &(is_nil(&1) or is_function(&1, 1)))
    check!(options, :python, "the path of a Python", &(is_nil(&1) or is_binary(&1)))

    check!(
      options,
      :resume_from,
      "a checkpoint or a folder with some",
      &(is_nil(&1) or is_binary(&1))
    )

    for key <- [:training_data, :output_path], do: check!(options, key, "a path", &is_binary/1)
    Map.new(options)
  end

  @doc "Raises where an option is not what is expected."
  def check!(options, key, expected, valid?) do
    unless valid?.(options[key]) do
      raise ArgumentError,
            "expected #{inspect(key)} to be #{expected}, got: #{inspect(options[key])}"
    end
  end

  @doc "What Python is told."
  @spec settings(map()) :: {:ok, map()} | {:error, Error.t()}
  def settings(options) do
    with {:ok, model} <- model(options.base_model),
         {:ok, file, done} <- resume(options) do
      {:ok,
       %{
         model: model,
         train: true,
         data: Path.expand(options.training_data),
         adapter_path: Path.expand(options.output_path),
         fine_tune_type: options.fine_tune_type,
         iters: options.iterations - done,
         done: done,
         resume_adapter_file: file,
         lora_parameters: %{
           rank: options.rank,
           scale: options.scale * 1.0,
           dropout: options.dropout * 1.0
         },
         learning_rate: options.learning_rate,
         batch_size: options.batch_size,
         grad_accumulation_steps: options.grad_accumulation,
         max_seq_length: options.max_seq_length,
         save_every: options.save_every,
         num_layers: if(options.num_layers == :all, do: -1, else: options.num_layers),
         steps_per_report: options.steps_per_report,
         steps_per_eval: options.steps_per_eval,
         seed: options.seed,
         mask_prompt: options.mask_prompt
       }}
    end
  end

  # A Hub id goes to mlx_lm as it is: it uses the same cache, and needs files that Bombus does not.
  def model(word) when is_binary(word), do: word |> Source.from_word() |> model()
  def model({:hf, id}) when is_binary(id), do: {:ok, id}
  # It takes no such options.
  def model({:hf, _id, _options} = source), do: Source.resolve(source, :any)
  def model(source), do: Source.resolve(source, :model)

  defp resume(%{resume_from: nil}), do: {:ok, nil, 0}

  defp resume(%{resume_from: from, iterations: iterations}) do
    with {:ok, file, done} <- checkpoint(Path.expand(from)) do
      if done < iterations do
        {:ok, file, done}
      else
        Error.error(:already_done, "`#{file}` has #{done} of #{iterations} iterations")
      end
    end
  end

  @checkpoint ~r/^(\d{7})_adapters\.safetensors$/

  defp checkpoint(path) do
    cond do
      File.regular?(path) ->
        case Regex.run(@checkpoint, Path.basename(path)) do
          [_all, number] -> {:ok, path, String.to_integer(number)}
          nil -> {:ok, path, 0}
        end

      File.dir?(path) ->
        last = path |> File.ls!() |> Enum.filter(&(&1 =~ @checkpoint)) |> Enum.max(fn -> nil end)

        if last,
          do: checkpoint(Path.join(path, last)),
          else:
            Error.error(
              :not_found,
              "there is no checkpoint (0000100_adapters.safetensors) in `#{path}`"
            )

      true ->
        Error.error(:not_found, "there is no checkpoint `#{path}`")
    end
  end
end
