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
    * `:demo` - the model that ships with this package; `{:demo, name}` is one of its adapters
    * `{:hf, "owner/name"}` or `{:hf, "owner/name", options}` - a repository of the Hugging Face Hub.
      `Bombus.Hub` documents the options, the cache and the errors

  ## Errors

  What goes wrong at run time, and what a visitor typed wrongly, comes back as
  `{:error, %Bombus.Error{}}`. What the caller's code got wrong raises `ArgumentError`, which says what
  was expected. Every `load_x` has a `load_x!`, which raises in both cases.
  """

  require Logger

  alias Bombus.{Adapter, Embedding, Error, Hub, Model, Native, Options, Reranking, Source}
  alias Bombus.{Telemetry, Tensor, Tokenizer}

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
      doc: """
      `true` replaces a model that is in the folder. Its weights, configuration, tokenizer and templates
      are removed where the new model has none of that name; other files stay. With `false` a folder
      with such files is `{:error, %Bombus.Error{reason: :already_there}}`
      """
    ]
  ]
  @load_tokenizer [on_progress: Hub.Options.on_progress()]
  @load_adapter [
    scale: [
      type: {:custom, {Adapter, :scale}},
      type_spec: quote(do: number()),
      doc: "the scale of every module, in place of what `adapter_config.json` says"
    ],
    on_progress: Hub.Options.on_progress()
  ]
  @unload [
    cancel: [
      type: :boolean,
      default: false,
      doc: "`true` cancels the requests of a model or an adapter; without effect for a tokenizer"
    ]
  ]
  @score Embedding.request_options()

  @typedoc "An option of `embed/4`."
  @type embed_option :: unquote(Options.Spec.option(Embedding.schema()))

  @typedoc "An option of `rerank/5`."
  @type rerank_option :: unquote(Options.Spec.option(Reranking.schema()))

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

  `families/0` lists the families that it may be of, and the README what of each works.

  A checkpoint of AWQ or GPTQ in 4 bits is converted into MLX's format while it is loaded, with the same
  numbers. (It may have groups of 32, 64 or 128 consecutive inputs, and no `desc_act`.) The result goes
  through a file in the system's folder for temporary files, which must have room for it; `save_model/3`
  keeps it. Where a folder has several files `model*.safetensors`, those that form a whole model are
  taken, also where an index from before says otherwise.

  What would change the arithmetic and is not computed here is `:unsupported`, and the message names it:
  a `hidden_act` that is not the family's, `attention_bias` in a Qwen3, a sliding window in a Qwen.
  Fields of `generation_config.json` that would change a text and are not followed (`suppress_tokens`,
  `bad_words_ids`, ...) are logged, and so are `eos` ids outside the vocabulary.

  On an NVIDIA card one kernel serves most models in 4 bits. Where it does not, the steps go layer by
  layer, which is slower; a warning says why, and so does `model.spec.fallback`.

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
  The families of models that are loaded, by the `model_type` of their `config.json`, in alphabetical
  order.

  ## Examples

      "qwen3" in Bombus.families()
  """
  @spec families() :: [String.t()]
  def families, do: Native.families()

  @doc """
  Writes the checkpoint of a model to a folder, in MLX's format, which mlx-lm reads too. A model that was
  quantized or converted while it was loaded is saved so. The tokenizer and all other files of the source
  are copied, except weights in other formats.

  The files are written beside their places, and renamed when all of them are whole: the folder has the
  whole model, or nothing of it. The files of the model's source must still be there. They are never
  written to, not through links either.

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

  An adapter is bound to a model when it is first used with it. Every tensor must then belong to a module
  of the model and have the right shape. If not, the error lists the first that do not.

  The configuration says which modules are adapted. Tensors of other modules are treated as by the
  library that made the adapter. PEFT leaves them out, and so does Bombus, with a warning in the log
  (`target_modules`, `exclude_modules`, `layers_to_transform`). mlx-lm refuses such an adapter, and so
  does Bombus (`num_layers`, `keys`).

  What would change the arithmetic and is not computed here is `:unsupported`, and the message says what
  to do: adapters that PEFT made with a changed base model (`init_lora_weights` of PiSSA, OLoRA, CorDA,
  LoRA-GA or LoftQ), `modules_to_save`, trained biases, and kinds other than LoRA and DoRA. A
  configuration may have null for a flag that is not set, and 4.0 for 4.

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

  For `n` ids there are `n - 1` numbers, since nothing comes before the first. Each is at most 0.

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
  The embeddings of texts: a vector `{model.spec.hidden_size}` of numbers `{:f, 32}` for each, in their
  order.

  A vector is made of the hidden states behind the model's last norm. Models for this, such as
  Qwen3-Embedding, load as they are published, and so do their adapters; any other model works too. A
  text gets the tokens that its tokenizer puts around one: Qwen3-Embedding's appends `<|endoftext|>`,
  whose hidden state is the embedding. No chat template is applied.

  The texts of all callers go through the model together, long ones in chunks, beside what it generates.
  Texts are never cut: one that is longer than the context is `{:error, %Bombus.Error{reason:
  :prompt_too_long}}`, whose message says which it is ("text 3 of 10"). It is an error of the whole call,
  as everything that goes wrong is.

  ## Options

  #{Options.docs(Embedding.schema())}
  ## Examples

      task = "Given a web search query, retrieve relevant passages that answer the query"
      {:ok, [query]} = Bombus.embed(model, tokenizer, ["What do bees eat?"], instruction: task)
      {:ok, documents} = Bombus.embed(model, tokenizer, ["Bees eat nectar and pollen.", "Tea is hot."])
      # Cosines, of which the higher is of the nearer text
      for document <- documents, do: document |> Bombus.Tensor.to_nx() |> Nx.dot(Bombus.Tensor.to_nx(query))
  """
  @spec embed(Model.t(), Tokenizer.t(), [String.t()], [embed_option()]) ::
          {:ok, [Tensor.t()]} | {:error, Error.t()}
  def embed(model, tokenizer, texts, options \\ []) do
    model = Options.handle!(model, Model)
    tokenizer = Options.handle!(tokenizer, Tokenizer)
    options = Embedding.options!(options, model, "Bombus.embed/4")
    Embedding.run(model, tokenizer, Embedding.texts!(texts, "the texts"), options)
  end

  @doc """
  How well each of some documents answers a query, in Qwen3-Reranker's way: a number in 0..1 for each,
  in their order.

  The model is asked whether the document meets the query's requirements, and the score is its
  probability of "yes", where the answer can only be "yes" or "no". The prompt is that of Qwen3-Reranker's
  model card. Another model that was trained so works too, where its tokenizer has ChatML's tokens and
  one token for each answer; if not, the reason is `:unsupported`.

  The documents go through the model in one batch, as the texts of `embed/4` do. One that is longer than
  the context, with the prompt around it, is the error `:prompt_too_long`, whose message says which it is
  ("document 3 of 10").

  ## Options

  #{Options.docs(Reranking.schema())}
  ## Examples

      documents = ["Tea is hot.", "Bees eat nectar and pollen."]
      {:ok, scores} = Bombus.rerank(model, tokenizer, "What do bees eat?", documents)
      {best, _score} = documents |> Enum.zip(scores) |> Enum.max_by(&elem(&1, 1))
  """
  @spec rerank(Model.t(), Tokenizer.t(), String.t(), [String.t()], [rerank_option()]) ::
          {:ok, [float()]} | {:error, Error.t()}
  def rerank(model, tokenizer, query, documents, options \\ []) do
    model = Options.handle!(model, Model)
    tokenizer = Options.handle!(tokenizer, Tokenizer)
    Reranking.run(model, tokenizer, query, documents, options)
  end

  @doc """
  Frees the memory of a model, a tokenizer or an adapter now, while its struct is still held.

  Without it, the memory is freed once no process holds the struct any more and the garbage collector
  has seen that. In a process that does little this may take long.

    * a model - requests that run or wait end first; `:ok` comes back when the memory is freed. With
      `cancel: true` they end at once: those for text with the finish reason `:cancelled`, those for
      scores with the error `:stopped`
    * an adapter - the same for the requests that use it; others go on
    * a tokenizer - `:ok` comes back at once; requests that use it keep it until they end

  Later requests that use it get `{:error, %Bombus.Error{reason: :unloaded}}`. To unload it again is
  `:ok`.

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

    * `:active` - bytes in weights, adapters and caches that are in use: MLX's arrays, and what the CPU
      backend holds (its weights are mapped from their files)
    * `:cached` - bytes that are kept for later: memory that MLX keeps for its next arrays, and the keys
      and values of finished sequences (`:prefix_cache`)
    * `:peak` - the most bytes that were active at once
    * `:kv` - bytes in the KV caches of running sequences, without what they share with the prefix cache
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
