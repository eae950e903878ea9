defmodule Bombus.Training.LoRA do
  @moduledoc """
  Fine-tunes a model with mlx_lm, in a Python beside the VM: from texts to an adapter.

      {:ok, _report} = Bombus.Training.LoRA.prepare_data(my_posts, "data", prompt: "Write a post")

      {:ok, path} =
        Bombus.Training.LoRA.train(
          base_model: "mlx-community/Qwen3-0.6B-4bit",
          training_data: "data",
          output_path: "adapters/my-posts",
          iterations: 600
        )

      {:ok, adapter} = Bombus.load_adapter(path)

  Training needs a Python with mlx_lm: `python3 -m pip install mlx mlx-lm` on a Mac,
  `python3 -m pip install "mlx[cpu]" mlx-lm` (or `"mlx[cuda13]"`) on Linux. The
  [guide to fine-tuning](fine_tuning.md) goes through all of it.
  """

  alias Bombus.Error
  alias Bombus.Options.Spec
  alias Bombus.Training.LoRA.{Data, Events, Folder, Jsonl, Monitor, Options, Progress, Rates, Run}

  @typedoc """
  What a training reports.

    * `:type` - `:start`, `:train`, `:validation` or `:checkpoint`; the last event of
      `monitor_training/2` is `:done`, `:error` or `:cancelled`
    * `:iteration` - how many iterations are done
    * `:loss` - the mean cross entropy of a token, in nats; in a `:train` since the last report
    * `:tokens_per_second`, `:iterations_per_second`, `:learning_rate`, `:trained_tokens` - in a `:train`
    * `:seconds` - how long a validation took
    * `:peak_memory` - in bytes
    * `:path` - the file of a checkpoint, or the folder of the adapter
    * `:warnings` - in a `:done`, where there are any: texts that are logged too, such as that the loss
      has grown
  """
  @type event :: %{
          required(:type) =>
            :start | :train | :validation | :checkpoint | :done | :error | :cancelled,
          optional(:iteration) => non_neg_integer(),
          optional(:iterations) => pos_integer(),
          optional(:loss) => number(),
          optional(:learning_rate) => number(),
          optional(:tokens_per_second) => number(),
          optional(:iterations_per_second) => number(),
          optional(:trained_tokens) => non_neg_integer(),
          optional(:peak_memory) => number(),
          optional(:seconds) => number(),
          optional(:path) => Path.t(),
          optional(:reason) => String.t(),
          optional(:message) => String.t(),
          optional(:warnings) => [String.t()],
          optional(:os_pid) => pos_integer()
        }

  @typedoc "A row of `prepare_data/3`."
  @type row ::
          String.t()
          | %{optional(atom()) => term()}
          | %{optional(String.t()) => term()}
          | keyword()
          | struct()

  @typedoc "An option of `prepare_data/3`."
  @type prepare_option :: unquote(Spec.option(Options.schema(:prepare)))

  @typedoc "An option of `train/1`."
  @type train_option :: unquote(Spec.option(Options.schema(:train)))

  @typedoc "An option of `monitor_training/2`."
  @type monitor_option :: unquote(Spec.option(Options.schema(:monitor)))

  @typedoc "What `prepare_data/3` took, and what it left out."
  @type report :: %{
          train: pos_integer(),
          valid: non_neg_integer(),
          skipped: non_neg_integer(),
          reasons: %{String.t() => pos_integer()},
          examples: [%{row: pos_integer(), reason: String.t()}]
        }

  @doc """
  Writes `train.jsonl` and `valid.jsonl` in chat format into the folder `dir`, which is made, and
  reports what it took and what it left out.

  `rows` is a list, a stream or another enumerable; a stream of any length takes little memory. A row
  is one of

    * a text, or `%{text: text}`: an answer to `:prompt`
    * `%{prompt: text, completion: text}`
    * `%{messages: [%{role: role, content: text}, ...]}`, whose last message is the assistant's;
      with `:tools`, where the model is to learn to call them

  as a map with atoms or strings as keys, a keyword list or a struct. Other fields are ignored, and so
  are fields that are nil. A content may also be a list of parts (`%{type: "text", text: text}`), which
  are joined.

  Other rows are left out, and so are rows that are not valid UTF-8 or whose answer is shorter than
  `:min_length`.

      {:ok, report} = Bombus.Training.LoRA.prepare_data(rows, "data")
      report
      #=> %{train: 180, valid: 20, skipped: 3,
      #=>   reasons: %{"the answer is empty" => 2, "it has a prompt and no completion" => 1},
      #=>   examples: [%{row: 17, reason: "the answer is empty"}, ...]}

  `:examples` are the first ten that were left out; rows count from 1.

  `{:error, %Bombus.Error{}}` has the reason `:no_valid_content` where no row is left, and `:io` or
  `:disk_full` where the folder cannot be written to; an earlier `train.jsonl` is then still there.

  ## Options

  #{Options.docs(:prepare)}
  """
  @spec prepare_data(Enumerable.t(row()), Path.t(), [prepare_option()]) ::
          {:ok, report()} | {:error, Error.t()}
  def prepare_data(rows, dir, options \\ []), do: Data.prepare(rows, dir, options)

  @doc """
  Trains an adapter and returns its folder, ready for `Bombus.load_adapter/2`.

  It returns when the training is over. If the calling process or the VM ends, Python ends too;
  `cancel/1` stops a training from another process.

  ## Options

  #{Options.docs(:train)}
  A training that makes things worse still ends with `{:ok, path}`. When the loss of the rows that it
  trained with has grown, a warning is logged, and stands in the last event of `monitor_training/2`. The
  cause is nearly always too high a `:learning_rate`. There are such warnings too for rows that were cut
  off, and for iterations that are too few for a single step (`:grad_accumulation`).

  ## Errors

  `{:error, %Bombus.Error{}}` with the reason

    * `:python_missing`, `:mlx_lm_missing` - the message says what to install
    * `:not_found`, `:bad_training_data`, `:too_few_rows` - of the data, the model or the checkpoint; the
      message names file and line. All rows of a file must have one format, and a line at most 64 MiB.
      With `:mask_prompt` a prompt that fills `:max_seq_length` leaves nothing to learn
    * `:bad_request` - `:num_layers` is more than the model has
    * `:already_there` - an adapter is in `:output_path`: see `:overwrite` and `:resume_from`
    * `:already_done` - nothing is left to resume
    * `:busy` - another training of this node writes to the same folder
    * `:loss_is_nan` - the loss is no number any more; a lower `:learning_rate` may help
    * `:out_of_memory`, `:disk_full`
    * `:training_killed`, `:training_failed` - the message quotes what Python said; `training.log` has all
      of it
    * `:cancelled` - by `cancel/1`
  """
  @spec train([train_option()]) :: {:ok, Path.t()} | {:error, Error.t()}
  def train(options) do
    options = Options.validate!(options, :train)
    path = Path.expand(options.output_path)
    Folder.starting(path, fn -> train(options, path) end)
  end

  defp train(options, path) do
    with :ok <- Jsonl.check(options.training_data, options.batch_size, options.mask_prompt),
         {:ok, settings} <- Options.settings(options),
         {:ok, python} <- python(options.python) do
      on_event = options.on_progress || Progress.bar(options.iterations)
      result = Run.run(python, settings, on_event)
      if match?({:ok, _path}, result), do: Rates.keep(settings.model, rate(path))
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
    events = Events.read(Folder.events(path))
    rates = for %{iterations_per_second: rate} <- events, is_number(rate), do: rate
    if rates != [], do: Enum.sum(rates) / length(rates)
  end

  @doc """
  Stops the training that writes to `output_path`, and returns when Python has ended. The call to
  `train/1` returns `{:error, %Bombus.Error{reason: :cancelled}}`; checkpoints stay.
  """
  @spec cancel(Path.t()) :: :ok | {:error, Error.t()}
  def cancel(output_path), do: Run.cancel(path!(output_path))

  @doc """
  A stream of the events of the training that writes, or wrote, to `output_path`, from its first one on.
  It ends after `:done`, `:error` or `:cancelled`, or when Python has ended without one of them.

  Where nothing has trained yet, the stream waits for a training to begin. When none does, it raises a
  `Bombus.Error` with the reason `:not_found`.

  ## Options

  #{Options.docs(:monitor)}
  ## Examples

      for %{type: :train} = event <- Bombus.Training.LoRA.monitor_training("adapters/my-posts") do
        IO.puts("\#{event.iteration}: \#{event.loss}")
      end
  """
  @spec monitor_training(Path.t(), [monitor_option()]) :: Enumerable.t(event())
  def monitor_training(output_path, options \\ []) do
    Monitor.stream(path!(output_path), Options.validate!(options, :monitor).timeout)
  end

  defp path!(path) do
    if Bombus.Options.path?(path),
      do: Path.expand(path),
      else:
        raise(ArgumentError, "expected the path of a folder, got: #{Bombus.Options.show(path)}")
  end

  @doc """
  How many seconds that many iterations of a model take, as `%{seconds: number, source: :measured | :guess}`.

  `:measured` is by the rate of the last training of that model on this machine, whatever its options
  were. Without one it is a guess from the size of the model: an iteration takes a second for each two
  billion parameters. It may be wrong by a factor of ten.
  """
  @spec estimate_training_time(pos_integer(), Bombus.source()) ::
          %{seconds: float(), source: :measured | :guess} | {:error, Error.t()}
  def estimate_training_time(iterations, model) when iterations in 1..0x7FFFFFFF do
    with {:ok, name} <- Options.model(model) do
      case Rates.get(name) do
        nil -> %{seconds: iterations * billions(name) / 2, source: :guess}
        rate -> %{seconds: iterations / rate, source: :measured}
      end
    end
  end

  def estimate_training_time(iterations, _model) do
    raise ArgumentError,
          "expected the iterations to be a whole number in 1..2147483647, " <>
            "got: #{Bombus.Options.show(iterations)}"
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
