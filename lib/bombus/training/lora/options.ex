defmodule Bombus.Training.LoRA.Options do
  @moduledoc false
  # What `train` is told, and what mlx_lm is told of it.

  alias Bombus.{Error, Options, Source}

  @most 0x7FFFFFFF

  @prepare [
    prompt: [
      type: {:custom, {__MODULE__, :text}},
      type_spec: quote(do: String.t()),
      default: "Write a post",
      doc: "what a text answers"
    ],
    split_ratio: [
      type: {:custom, {__MODULE__, :ratio}},
      type_spec: quote(do: number()),
      default: 0.9,
      doc:
        "the part that is trained on; the rest is for validation (at least one row, unless it is 1)"
    ],
    min_length: [
      type: {:integer, 0..@most},
      default: 1,
      doc: "the characters that an answer has at least"
    ],
    shuffle_seed: [
      type: {:integer, -@most..@most},
      default: 0,
      doc: "the same seed gives the same files"
    ]
  ]

  @train [
    base_model: [
      type: {:custom, {__MODULE__, :source}},
      type_spec: quote(do: Bombus.source()),
      required: true,
      doc:
        "a source; a string is a folder, or else a Hub id, which mlx_lm downloads into the same cache"
    ],
    training_data: [
      type: :path,
      required: true,
      doc: "a folder with `train.jsonl`, and `valid.jsonl` if there is one"
    ],
    output_path: [
      type: :path,
      required: true,
      doc: """
      the adapter's folder: `adapters.safetensors`, `adapter_config.json`, checkpoints,
      `training.jsonl` (events), `training.log` (Python's own words) and `loss.svg`
      """
    ],
    iterations: [type: {:integer, 1..@most}, default: 1000, doc: "an iteration is one batch"],
    rank: [type: {:integer, 1..@most}, default: 8, doc: "of the adapter: what it can learn"],
    scale: [type: {:number, -3.4e38, 3.4e38}, default: 20.0, doc: "of the adapter: its strength"],
    dropout: [
      type: {:custom, {__MODULE__, :dropout}},
      type_spec: quote(do: number()),
      default: 0.0,
      doc: "the part of the adapter's inputs that is left out, in 0..1, below 1"
    ],
    fine_tune_type: [type: {:in, [:lora, :dora]}, default: :lora, doc: "the kind of adapter"],
    num_layers: [
      type: {:or, [{:in, [:all]}, {:integer, 1..@most}]},
      default: :all,
      doc: "so many of the last layers are adapted"
    ],
    learning_rate: [
      type: {:custom, {__MODULE__, :positive}},
      type_spec: quote(do: number()),
      default: 1.0e-5,
      doc: "how far a step goes; 1.0e-5 to 2.0e-4 are usual"
    ],
    batch_size: [type: {:integer, 1..@most}, default: 1, doc: "rows in a batch"],
    grad_accumulation: [
      type: {:integer, 1..@most},
      default: 8,
      doc: "so many batches make one step"
    ],
    max_seq_length: [
      type: {:integer, 2..@most},
      default: 256,
      doc: "tokens; what is longer is cut off. With `:mask_prompt` a prompt must be shorter"
    ],
    mask_prompt: [type: :boolean, default: true, doc: "only the answers are learned"],
    steps_per_report: [type: {:integer, 1..@most}, default: 10, doc: "iterations"],
    steps_per_eval: [type: {:integer, 1..@most}, default: 200, doc: "iterations"],
    save_every: [type: {:integer, 1..@most}, default: 100, doc: "iterations"],
    seed: [type: {:integer, 0..@most}, default: 0, doc: "of order, dropout and first weights"],
    resume_from: [
      type: :path,
      doc: """
      a checkpoint (`.../0000100_adapters.safetensors`), or a folder for its last one: the iterations
      that are left are done, and numbers go on from there. The weights are kept; the optimizer
      starts anew
      """
    ],
    overwrite: [
      type: :boolean,
      default: false,
      doc: """
      true trains another adapter in the place of the one that is in `:output_path`. That one stays
      as it is until the first checkpoint, or the end, of the new one
      """
    ],
    python: [
      type: :string,
      doc: "the Python to use",
      by_default: "what the environment variable `BOMBUS_PYTHON` says, else `python3`"
    ],
    on_progress: [
      type: {:function, 1},
      type_spec: quote(do: (Bombus.Training.LoRA.event() -> term())),
      doc: "a function that is called with every event, in the calling process",
      by_default: "a progress bar, where there is a terminal"
    ]
  ]

  @monitor [
    timeout: [
      type: {:or, [{:in, [:infinity]}, {:integer, 0..@most}]},
      type_spec: quote(do: timeout()),
      default: 10_000,
      doc: "the milliseconds that it waits for a training to begin"
    ]
  ]

  @schemas [prepare: @prepare, train: @train, monitor: @monitor]
  @functions [
    prepare: "Bombus.Training.LoRA.prepare_data/3",
    train: "Bombus.Training.LoRA.train/1",
    monitor: "Bombus.Training.LoRA.monitor_training/2"
  ]

  @doc "The options of `prepare_data`, `train` or `monitor_training`, as a map with all defaults."
  def validate!(options, function) do
    options |> Options.validate!(@schemas[function], @functions[function]) |> Map.new()
  end

  def docs(function), do: Options.docs(@schemas[function])

  @doc "The table of one of the functions."
  def schema(function), do: @schemas[function]

  def text(text) do
    if is_binary(text) and String.valid?(text) and String.trim(text) != "",
      do: {:ok, text},
      else: {:error, "a text"}
  end

  def ratio(ratio) do
    if is_number(ratio) and ratio > 0 and ratio <= 1,
      do: {:ok, ratio},
      else: {:error, "a number above 0 and at most 1"}
  end

  def dropout(part) do
    if is_number(part) and part >= 0 and part < 1,
      do: {:ok, part},
      else: {:error, "a number in 0..1, below 1"}
  end

  def positive(rate) do
    if is_number(rate) and rate > 0 and rate < 3.4e38,
      do: {:ok, rate},
      else: {:error, "a number above 0"}
  end

  def source(source) do
    case source do
      word when is_binary(word) and word != "" -> {:ok, word}
      :demo -> {:ok, source}
      {:local, path} when is_binary(path) -> {:ok, source}
      {:hf, id} when is_binary(id) -> {:ok, source}
      {:hf, id, options} when is_binary(id) and is_list(options) -> {:ok, source}
      _other -> {:error, "a Hub id, a folder or a source"}
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
         overwrite: options.overwrite,
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
