defmodule Bombus.Training.LoRA do
  @moduledoc """
  Fine-tunes a model with mlx_lm, in a Python beside the VM: from texts to an adapter.

      :ok = Bombus.Training.LoRA.prepare_data(my_posts, "data", prompt: "Write a post")

      {:ok, path} =
        Bombus.Training.LoRA.train(
          base_model: "mlx-community/Qwen3-0.6B-4bit",
          training_data: "data",
          output_path: "adapters/my-posts",
          iterations: 600
        )

      {:ok, adapter} = Bombus.load_adapter(path)

  Training needs a Python with mlx_lm: `python3 -m pip install mlx mlx-lm` on a Mac,
  `python3 -m pip install "mlx[cpu]" mlx-lm` (or `"mlx[cuda13]"`) on Linux. The guide "Fine-tuning"
  goes through all of it.
  """

  alias Bombus.Error
  alias Bombus.Training.LoRA.{Data, Events, Options, Progress, Rates, Run}

  @typedoc """
  What a training reports.

    * `:type` - `:start`, `:train`, `:validation`, `:checkpoint`, and in `monitor_training/1` the
      last one: `:done`, `:error` or `:cancelled`
    * `:iteration` - so many are done
    * `:loss` - the mean cross entropy of a token, in nats (`:train`: since the last report)
    * `:tokens_per_second`, `:iterations_per_second`, `:learning_rate`, `:trained_tokens` (`:train`)
    * `:seconds` - what a validation took
    * `:peak_memory` - bytes
    * `:path` - of a checkpoint, or of the adapter
  """
  @type event :: %{required(:type) => atom(), optional(atom()) => term()}

  @doc """
  Writes `train.jsonl` and `valid.jsonl` in chat format into the folder `dir`, which is made.

  Contents are texts, each an answer to `:prompt`; or `%{prompt: text, completion: text}`, or
  `%{messages: [%{role: role, content: text}, ...]}` with the assistant's last. What is none of
  these, is not UTF-8 or too short is left out; `{:error, :no_valid_content}` if that is all of it.

  ## Options

    * `:prompt` - what a text answers, `"Write a post"` by default
    * `:split_ratio` - the part that is trained on, 0.9 by default; the rest is for validation
      (at least one, unless the ratio is 1)
    * `:min_length` - the characters that an answer has at least, 1 by default
    * `:shuffle_seed` - 0 by default; the same seed gives the same files
  """
  @spec prepare_data([term()], Path.t(), keyword()) ::
          :ok | {:error, :no_valid_content | Error.t()}
  def prepare_data(contents, dir, options \\ []), do: Data.prepare(contents, dir, options)

  @doc """
  Trains an adapter and returns its folder, ready for `Bombus.load_adapter/2`.

  It blocks until the training is over. If the calling process ends, or the VM, so does Python;
  `cancel/1` stops it from another process.

  ## Options

    * `:base_model` (required) - a Hub id (which mlx_lm downloads, into the same cache), a folder,
      or a source
    * `:training_data` (required) - a folder with `train.jsonl`, and `valid.jsonl` if there is one
    * `:output_path` (required) - the adapter's folder: `adapters.safetensors`,
      `adapter_config.json`, checkpoints, `training.jsonl` (events), `training.log` (Python's own
      words) and `loss.svg`
    * `:iterations` - 1000; an iteration is one batch
    * `:rank` - 8, `:scale` - 20.0, `:dropout` - 0.0: of the adapter
    * `:fine_tune_type` - `:lora` (default) or `:dora`
    * `:num_layers` - so many of the last layers are adapted; `:all` by default
    * `:learning_rate` - 1.0e-5
    * `:batch_size` - 1; `:grad_accumulation` - 8 batches make one step
    * `:max_seq_length` - 256 tokens; what is longer is cut off
    * `:mask_prompt` - true: only the answers are learned
    * `:steps_per_report` - 10, `:steps_per_eval` - 200, `:save_every` - 100 iterations
    * `:seed` - 0
    * `:resume_from` - a checkpoint (`.../0000100_adapters.safetensors`), or a folder for its last
      one: the iterations that are left are done, and numbers go on from there. The weights are
      kept; the optimizer starts anew.
    * `:python` - the Python to use; by default what the environment variable `BOMBUS_PYTHON` says,
      else `python3`
    * `:on_progress` - a function that gets every `t:event/0`, in the calling process; a progress
      bar by default, where there is a terminal

  ## Errors

  `{:error, %Bombus.Error{}}` with the reason

    * `:python_missing`, `:mlx_lm_missing` - the message says what to install
    * `:not_found`, `:bad_training_data`, `:too_few_rows` - of the data, the model or the checkpoint
    * `:already_done` - nothing is left to resume
    * `:busy` - another training of this node writes to the same folder
    * `:loss_is_nan`, `:out_of_memory`, `:disk_full`, `:training_killed`, `:training_failed` - with
      the last words of Python
    * `:cancelled`
  """
  @spec train(keyword()) :: {:ok, Path.t()} | {:error, Error.t()}
  def train(options) do
    options = Options.validate!(options)

    with :ok <- Data.check(options.training_data, options.batch_size, options.mask_prompt),
         {:ok, settings} <- Options.settings(options),
         {:ok, python} <- python(options.python) do
      on_event = options.on_progress || Progress.bar(options.iterations)
      result = Run.run(python, settings, on_event)
      Rates.keep(settings.model, rate(settings.adapter_path))
      result
    end
  end

  defp python(nil), do: python(System.get_env("BOMBUS_PYTHON", "python3"))

  defp python(name) do
    case System.find_executable(name) do
      nil ->
        Error.error(:python_missing, "there is no Python `#{name}`; then: #{Run.install()}")

      path ->
        {:ok, path}
    end
  end

  defp rate(path) do
    rates = for %{iterations_per_second: rate} <- Events.read(path), is_number(rate), do: rate
    if rates != [], do: Enum.sum(rates) / length(rates)
  end

  @doc """
  Stops the training that writes to `output_path`, and returns when Python has ended. The call to
  `train/1` returns `{:error, %Bombus.Error{reason: :cancelled}}`; checkpoints stay.
  """
  @spec cancel(Path.t()) :: :ok | {:error, Error.t()}
  def cancel(output_path), do: Run.cancel(Path.expand(output_path))

  @doc """
  The events of the training that writes, or wrote, to `output_path`, from its first one on, as a
  stream. It ends behind `:done`, `:error` or `:cancelled`, or where Python is gone without.

  ## Examples

      for %{type: :train} = event <- Bombus.Training.LoRA.monitor_training("adapters/my-posts") do
        IO.puts("\#{event.iteration}: \#{event.loss}")
      end
  """
  @spec monitor_training(Path.t()) :: Enumerable.t(event())
  def monitor_training(output_path), do: Events.stream(Path.expand(output_path))

  @doc """
  The seconds that so many iterations take, as `%{seconds: number, source: :measured | :guess}`.

  Measured is the rate of the last training of that model on this machine (with whatever options it
  had). Else it is guessed from the size of the model: a second for each two billion parameters,
  which may be off by a factor of ten.
  """
  @spec estimate_training_time(pos_integer(), term()) ::
          %{seconds: float(), source: :measured | :guess} | {:error, Error.t()}
  def estimate_training_time(iterations, model) when is_integer(iterations) and iterations > 0 do
    with {:ok, name} <- Options.model(model) do
      case Rates.get(name) do
        nil -> %{seconds: iterations * billions(name) / 2, source: :guess}
        rate -> %{seconds: iterations / rate, source: :measured}
      end
    end
  end

  # Of a folder from its files (4 bits a parameter), of an id from its name.
  defp billions(name) do
    files = Path.wildcard(Path.join(name, "model*.safetensors"))

    case {files, Regex.run(~r/(\d+(?:\.\d+)?)([bm])\b/i, name)} do
      {[_first | _rest], _match} -> Enum.sum_by(files, &File.stat!(&1).size) * 2 / 1.0e9
      {[], [_all, number, unit]} when unit in ["b", "B"] -> number(number)
      {[], [_all, number, _unit]} -> number(number) / 1000
      {[], nil} -> 1.0
    end
  end

  defp number(text), do: text |> Float.parse() |> elem(0)
end
