defmodule Bombus do
  @moduledoc """
  Quantized language models with LoRA adapters, in any Elixir app.

      {:ok, model} = Bombus.load_model(:demo)
      {:ok, tokenizer} = Bombus.load_tokenizer(:demo)
      {:ok, adapter} = Bombus.load_adapter({:demo, "pirate"})

      serving = Bombus.Serving.new(model, tokenizer, adapter: adapter, max_new_tokens: 100)
      Bombus.Serving.run(serving, "Write a post about coffee")

  ## Sources

  A source says where the files are:

    * `{:local, path}` - a folder; a bare string is one too
    * `:demo` - the model that ships with this package, and `{:demo, name}` its adapters
    * `{:hf, "owner/name"}` or `{:hf, "owner/name", options}` - the Hugging Face Hub: see
      `Bombus.Hub` for the options, the cache and the errors. What takes a source from there takes
      `:on_progress` too, a function that hears of the download

  ## Errors

  Errors for data, raises for code: what the world did, or a visitor typed, comes back as
  `{:error, %Bombus.Error{}}`; what the caller's code got wrong raises `ArgumentError`, which says what
  was expected. Every `load_x` has a `load_x!`, which raises both.
  """

  require Logger

  alias Bombus.{Adapter, Error, Hub, Model, Native, Options, Source, Telemetry, Tokenizer}

  @typedoc "Where the files of a model, a tokenizer or an adapter are: see \"Sources\" above."
  @type source ::
          :demo
          | {:demo, String.t()}
          | {:local, Path.t()}
          | {:hf, Hub.id()}
          | {:hf, Hub.id(), [Hub.option()]}
          | Path.t()

  @save_model [
    overwrite: [
      type: :boolean,
      default: false,
      doc:
        "true puts the model in the place of another one that is in the folder: files that would be " <>
          "taken for the new model's go (its weights, configuration, tokenizer and templates), others " <>
          "stay. Without it such files, and those that would be replaced, are " <>
          "`{:error, %Bombus.Error{reason: :already_there}}`"
    ]
  ]
  @load_tokenizer [on_progress: Hub.Options.on_progress()]
  @load_adapter [
    scale: [
      type: {:custom, {Adapter, :scale}},
      type_spec: quote(do: number()),
      doc: "takes the place of what `adapter_config.json` says, for every module"
    ],
    on_progress: Hub.Options.on_progress()
  ]
  @unload [
    cancel: [
      type: :boolean,
      default: false,
      doc: "of a model or an adapter: whether requests that run or wait are cancelled"
    ]
  ]
  @score [
    adapter: [type: {:handle, Adapter}, doc: "an adapter to score with", by_default: "none"],
    timeout: [
      type: {:or, [{:in, [:infinity]}, {:integer, 0..0xFFFFFFFF}]},
      type_spec: quote(do: timeout()),
      expected: "milliseconds, :infinity or nil",
      by_default: "none",
      doc: "after how many milliseconds it ends with the error `:timeout`"
    ]
  ]

  @typedoc "An option of `load_adapter/2`."
  @type adapter_option :: unquote(Options.Spec.option(@load_adapter))

  @typedoc "An option of `load_tokenizer/2`."
  @type tokenizer_option :: unquote(Options.Spec.option(@load_tokenizer))

  @typedoc "An option of `save_model/3`."
  @type save_option :: unquote(Options.Spec.option(@save_model))

  @typedoc "An option of `score/3`."
  @type score_option :: unquote(Options.Spec.option(@score))

  @typedoc "An option of `unload/2`."
  @type unload_option :: unquote(Options.Spec.option(@unload))

  @typedoc "What is in use: see `memory_info/0`."
  @type memory_info :: %{
          active: non_neg_integer(),
          cached: non_neg_integer(),
          peak: non_neg_integer(),
          kv: non_neg_integer(),
          models: non_neg_integer(),
          adapters: non_neg_integer(),
          sequences: non_neg_integer()
        }

  @doc """
  Loads a model: a folder with `config.json` and safetensors, dense or in MLX's format.

  AWQ's and GPTQ's 4 bits are brought into MLX's format while they are loaded, with the same numbers, through
  a file in the system's folder for temporary files, where there must be room for it; `save_model/3` keeps it.
  (Groups of 32, 64 or 128 consecutive inputs; not `desc_act`.) Of several files `model*.safetensors` those
  are taken that are a whole model, whatever an index says that is left from before.

  What changes the arithmetic and is not computed here is refused by its name (`hidden_act`, `attention_bias`,
  a sliding window within the context). What of `generation_config.json` would change a text and is not
  followed (`suppress_tokens`, `bad_words_ids`, ...) is said in the log.

  ## Options

  #{Options.docs(Model.Options.schema())}
  ## Examples

      {:ok, model} = Bombus.load_model({:local, "models/Qwen3-8B-MLX-4bit"}, device: :gpu)
      model.quantization
      #=> %{bits: 4, group_size: 64, mode: :affine, overrides: %{}}
  """
  @spec load_model(source(), [Model.option()]) :: {:ok, Model.t()} | {:error, Error.t()}
  def load_model(source, options \\ []) do
    options = Options.validate!(options, Model.Options.schema(), "Bombus.load_model/2")
    Native.Library.warn_if_replaced()

    Telemetry.load(:model, source, fn ->
      with {:ok, path} <- Source.resolve(source, :model, options[:on_progress]),
           native = Model.Options.native(options),
           {:ok, loaded} <- Native.await(&Native.load_model(path, native, &1)),
           name = Source.name(source),
           model = Model.from_native(loaded, name),
           :ok <- check_quantization(model, options[:quantization]) do
        loaded |> elem(1) |> Model.warnings(name) |> Enum.each(&Logger.warning(&1))
        Telemetry.watch(model)
        {:ok, model}
      end
    end)
  end

  @doc "As `load_model/2`, but returns the model or raises."
  @spec load_model!(source(), [Model.option()]) :: Model.t()
  def load_model!(source, options \\ []), do: Error.unwrap!(load_model(source, options))

  @doc """
  Writes the checkpoint of a model to a folder, in MLX's format: quantized where loading did that, as MLX
  has it where it was AWQ's or GPTQ's. mlx-lm reads what is there too. The tokenizer and all other files of
  the source go along, but for weights in other formats.

  All or nothing: the files are written beside their places and renamed when all of them are whole. The
  files of the model's source must still be there, and are never written to, not by links either.

  ## Options

  #{Options.docs(@save_model)}
  Where the disk has no room, the reason is `:disk_full`.

  ## Examples

      {:ok, model} = Bombus.load_model({:local, "models/Qwen3-0.6B"}, quantization: :int4)
      :ok = Bombus.save_model(model, "models/Qwen3-0.6B-4bit")
  """
  @spec save_model(Model.t(), Path.t(), [save_option()]) :: :ok | {:error, Error.t()}
  def save_model(model, path, options \\ []) do
    model = Options.handle!(model, Model)
    options = Options.validate!(options, @save_model, "Bombus.save_model/3")

    unless Options.path?(path) do
      raise ArgumentError, "expected the path of a folder, got: #{Options.show(path)}"
    end

    save = &Native.save_model(model.ref, Path.expand(path), options[:overwrite], &1)
    with {:ok, _saved} <- Native.await(save), do: :ok
  end

  @doc """
  Loads a LoRA or DoRA adapter from a folder, in one of two formats:

    * mlx-lm's: `adapters.safetensors` and `adapter_config.json`
    * PEFT's: `adapter_model.safetensors` and `adapter_config.json`; its scale is `lora_alpha / r`,
      with rsLoRA `lora_alpha / sqrt(r)`, for each module as `rank_pattern` and `alpha_pattern` say

  The path of a file of tensors works too, with `adapter_config.json` beside it: the checkpoint of
  a training (`0000100_adapters.safetensors`).

  An adapter is bound to a model when it is first used with it. Every tensor must then find its
  module with the right shape: else the answer is an error that lists the first that do not.

  The configuration says which modules are adapted. Of others, PEFT leaves the tensors out, and so does
  Bombus, with a warning in the log (`target_modules`, `exclude_modules`, `layers_to_transform`); mlx-lm
  refuses such an adapter, and it does not fit here either (`num_layers`, `keys`).

  What would change the arithmetic and is not known here is refused with `reason: :unsupported`, and
  the message says what to do: adapters that PEFT made with a changed base model
  (`init_lora_weights` of PiSSA, OLoRA, CorDA, LoRA-GA or LoftQ), `modules_to_save`, trained biases,
  kinds other than LoRA and DoRA. A configuration may have null where a flag is not set, and 4.0
  for 4.

  ## Options

  #{Options.docs(@load_adapter)}
  ## Examples

      {:ok, adapter} = Bombus.load_adapter({:local, "adapters/my-posts"}, scale: 20.0)
  """
  @spec load_adapter(source(), [adapter_option()]) :: {:ok, Adapter.t()} | {:error, Error.t()}
  def load_adapter(source, options \\ []) do
    options = Options.validate!(options, @load_adapter, "Bombus.load_adapter/2")

    Telemetry.load(:adapter, source, fn ->
      with {:ok, path} <- Source.resolve(source, :adapter, options[:on_progress]),
           {:ok, loaded} <- Native.await(&Native.load_adapter(path, options[:scale], &1)) do
        Enum.each(elem(loaded, 4), &Logger.warning(&1))
        {:ok, Adapter.from_native(loaded, Source.name(source))}
      end
    end)
  end

  @doc "As `load_adapter/2`, but returns the adapter or raises."
  @spec load_adapter!(source(), [adapter_option()]) :: Adapter.t()
  def load_adapter!(source, options \\ []), do: Error.unwrap!(load_adapter(source, options))

  @doc """
  Loads a tokenizer: a folder with `tokenizer.json` (or with `vocab.json` and `merges.txt` of Qwen2's or
  GPT-2's), and the chat template beside it. See `Bombus.Tokenizer` for what it can do.

  ## Options

  #{Options.docs(@load_tokenizer)}
  ## Examples

      {:ok, tokenizer} = Bombus.load_tokenizer({:local, "models/Qwen3-8B-MLX-4bit"})
  """
  @spec load_tokenizer(source(), [tokenizer_option()]) ::
          {:ok, Tokenizer.t()} | {:error, Error.t()}
  def load_tokenizer(source, options \\ []) do
    options = Options.validate!(options, @load_tokenizer, "Bombus.load_tokenizer/2")

    Telemetry.load(:tokenizer, source, fn ->
      with {:ok, path} <- Source.resolve(source, :tokenizer, options[:on_progress]),
           {:ok, loaded} <- Native.await(&Native.load_tokenizer(path, &1)) do
        {ref, %{chat_template: chat_template?} = spec} = loaded
        spec = spec |> Map.delete(:chat_template) |> Map.put(:chat_template?, chat_template?)
        {:ok, struct!(Tokenizer, Map.put(spec, :ref, ref))}
      end
    end)
  end

  @doc "As `load_tokenizer/2`, but returns the tokenizer or raises."
  @spec load_tokenizer!(source(), [tokenizer_option()]) :: Tokenizer.t()
  def load_tokenizer!(source, options \\ []), do: Error.unwrap!(load_tokenizer(source, options))

  @doc """
  The log-probabilities of a text, given as token ids: `ln p(token i | the tokens before it)`.

  For `n` ids there are `n - 1` numbers (floats, at most 0), since nothing comes before the first.

  ## Options

  #{Options.docs(@score)}
  ## Examples

      {:ok, logprobs} = Bombus.score(model, [1, 15, 27], adapter: adapter)
  """
  @spec score(Model.t(), [Tokenizer.token_id()], [score_option()]) ::
          {:ok, [float()]} | {:error, Error.t()}
  def score(model, token_ids, options \\ []) do
    model = Options.handle!(model, Model)
    options = Options.validate!(options, @score, "Bombus.score/3")
    Model.token_ids!(model, token_ids)
    adapter = options[:adapter] && options[:adapter].ref
    timeout = if options[:timeout] != :infinity, do: options[:timeout]
    score = &Native.score(model.ref, token_ids, adapter, timeout, &1)
    with {:scores, log_probs} <- Native.await(score, &Native.cancel/1), do: {:ok, log_probs}
  end

  @doc """
  Frees the memory of a model, a tokenizer or an adapter now, though its struct is still held.

  Without it, memory is given back once no process holds the struct any more and its memory has been
  collected, which for a process that does little may take long.

    * a model - requests that run or wait end first, and `:ok` is the answer when its memory is given
      back. `cancel: true` ends them at once instead: those for text with the reason `:cancelled`,
      those for scores with the error `:stopped`
    * an adapter - the same for the requests with it; those without it go on
    * a tokenizer - `:ok` is the answer at once; requests with it keep it until they end

  Later requests with it get `{:error, %Bombus.Error{reason: :unloaded}}`. What is unloaded already
  is `:ok`.

  ## Options

  #{Options.docs(@unload)}
  ## Examples

      {:ok, model} = Bombus.load_model(:demo)
      :ok = Bombus.unload(model)
      {:error, %Bombus.Error{reason: :unloaded}} = Bombus.score(model, [1, 15, 27])
  """
  @spec unload(Model.t() | Tokenizer.t() | Adapter.t(), [unload_option()]) :: :ok
  def unload(loaded, options \\ [])

  def unload(%kind{} = loaded, options) when kind in [Model, Tokenizer, Adapter] do
    %{ref: ref} = Options.handle!(loaded, kind)
    options = Options.validate!(options, @unload, "Bombus.unload/2")

    {:ok, :ok} =
      Native.await(fn reference ->
        case kind do
          Model -> Native.unload_model(ref, options[:cancel], reference)
          Adapter -> Native.unload_adapter(ref, options[:cancel], reference)
          Tokenizer -> Native.unload_tokenizer(ref, reference)
        end
      end)

    :ok
  end

  def unload(other, _options) do
    raise ArgumentError,
          "expected a model, a tokenizer or an adapter, got: #{Options.show(other)}"
  end

  @doc """
  What is in use, in the whole VM.

    * `:active`, `:cached`, `:peak` - bytes that MLX holds for arrays, keeps for the next ones, and
      has held at most; with what the CPU backend holds in weights (mapped from their files),
      adapters and caches. The keys and values of finished sequences that are kept for others
      (`:prefix_cache`) are `:cached`, and not `:active`
    * `:kv` - bytes in the KV caches of running sequences, without what they share with those
    * `:models`, `:adapters`, `:sequences` - how many are alive
  """
  @spec memory_info() :: memory_info()
  def memory_info, do: Native.memory_info() |> Error.from_native() |> Error.unwrap!()

  defp check_quantization(_model, nil), do: :ok

  defp check_quantization(%{quantization: quantization}, wanted) do
    if Map.take(quantization, Map.keys(wanted)) == wanted do
      :ok
    else
      Error.error(
        :quantization_mismatch,
        "the checkpoint is quantized with #{described(quantization)}, :quantization asks for " <>
          described(wanted)
      )
    end
  end

  defp described(%{bits: bits, group_size: size}), do: "#{bits} bits and groups of #{size}"
  defp described(%{bits: bits}), do: "#{bits} bits"
end
