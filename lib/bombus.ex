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

  What the world did comes back as `{:error, %Bombus.Error{}}`; what the caller wrote wrongly
  raises `ArgumentError`. Every `load_x` has a `load_x!`, which raises both.
  """

  alias Bombus.{Adapter, Error, Hub, Model, Native, Source, Telemetry, Tokenizer}

  @type source :: Source.t()

  @limits [:max_batch_size, :max_queue, :prefill_chunk, :max_context, :prefix_cache]
  @load_model_options [:device, :backend, :threads, :quantization, :on_progress] ++ @limits

  @doc """
  Loads a model: a folder with `config.json` and safetensors in MLX's format.

  ## Options

    * `:device` - what the model runs on:
        * `:auto` (default) - the GPU where MLX finds one, else the CPU
        * `:gpu` - MLX on Metal or CUDA, or `{:error, %Bombus.Error{reason: :no_gpu}}`
        * `:cpu` - Bombus's own kernels for CPUs, on the mapped file. Activations are float32; where
          they meet quantized weights they are written in 16 bits a number (24 in a float32
          checkpoint) with a scale for every group, more exact than bfloat16; keys and values are
          kept in float16 (float32 in a float32 checkpoint)
        * `{:mlx, :cpu}` - MLX's CPU device, for comparison, where MLX is built in
    * `:threads` - of `:cpu`: how many threads work on a step, 1 to 1024, the physical cores by
      default. All models share one pool, and take turns at it step by step
    * `:backend` - as in Bumblebee: a module or `{module, device: device}`; only the device counts
    * `:quantization` - `:int2` to `:int6`, `:int8`, or `[bits: 4, group_size: 64]` (64 is the default
      group). A dense checkpoint is quantized while it is loaded, as `mlx_lm.convert` does it: layer by layer,
      through a file in the system's folder for temporary files, where there must be room for the result.
      One that is quantized already must agree, or the answer is
      `{:error, %Bombus.Error{reason: :quantization_mismatch}}`
    * `:max_batch_size` - how many sequences run together, 32 by default
    * `:max_queue` - how many more requests may wait, 1024 by default; beyond that they are answered
      with `{:error, %Bombus.Error{reason: :overloaded}}`
    * `:prefill_chunk` - how many prompt tokens go into one step, beside a token of every sequence
      that is being generated: what a long prompt holds the others up for. 64 by default
      on `:cpu`, which is no slower there than more, 2048 on an NVIDIA card, else 512
    * `:max_context` - how many tokens a sequence may have, prompt and all; what the model was made
      for is the most, and the default
    * `:prefix_cache` - how many bytes of keys and values of finished sequences are kept, 1 GiB by
      default, 0 for none. A request whose tokens begin as those did, with the same adapter, computes
      only the rest: the next turn of a conversation, the same instructions for another visitor. What
      was used longest ago goes first

  ## Examples

      {:ok, model} = Bombus.load_model({:local, "models/Qwen3-8B-MLX-4bit"}, device: :gpu)
      model.quantization
      #=> %{bits: 4, group_size: 64, mode: :affine, overrides: %{}}
  """
  @spec load_model(source(), keyword()) :: {:ok, Model.t()} | {:error, Error.t()}
  def load_model(source, options \\ []) do
    options = options!(options, @load_model_options)
    wanted = quantization!(options[:quantization])
    on_progress = Hub.Options.on_progress!(options[:on_progress])

    native = %{
      device: device!(options),
      threads: options[:threads] && positive!(options, :threads, 1024),
      quantization: wanted && {wanted.bits, wanted[:group_size] || 64},
      limits: limits!(options)
    }

    Telemetry.load(:model, source, fn ->
      with {:ok, path} <- Source.resolve(source, :model, on_progress),
           {:ok, loaded} <- Native.await(&Native.load_model(path, native, &1)),
           {:ok, model} <-
             check_quantization(Model.from_native(loaded, Source.name(source)), wanted) do
        Telemetry.watch(model)
        {:ok, model}
      end
    end)
  end

  @doc false
  # Of the names in `@limits`; what is not given is nil.
  def limits!(options) do
    Map.new(@limits, fn
      :prefix_cache ->
        {:prefix_cache, options[:prefix_cache] && limit!(options, :prefix_cache, 0)}

      key ->
        {key, options[key] && positive!(options, key)}
    end)
  end

  @doc "As `load_model/2`, but returns the model or raises."
  @spec load_model!(source(), keyword()) :: Model.t()
  def load_model!(source, options \\ []), do: Error.unwrap!(load_model(source, options))

  @doc """
  Writes the checkpoint of a model to a folder, in MLX's format: quantized where loading did that. What
  `load_model/2` has loaded from there, mlx-lm reads too.

  The files of the model's source must still be there.

  ## Examples

      {:ok, model} = Bombus.load_model({:local, "models/Qwen3-0.6B"}, quantization: :int4)
      :ok = Bombus.save_model(model, "models/Qwen3-0.6B-4bit")
  """
  @spec save_model(Model.t(), Path.t()) :: :ok | {:error, Error.t()}
  def save_model(%Model{} = model, path) when is_binary(path) do
    with {:ok, _saved} <- Native.await(&Native.save_model(model.ref, Path.expand(path), &1)) do
      :ok
    end
  end

  def save_model(%Model{}, path) do
    raise ArgumentError, "expected the path of a folder, got: #{inspect(path)}"
  end

  def save_model(other, _path) do
    raise ArgumentError, "expected a model made by Bombus.load_model/2, got: #{inspect(other)}"
  end

  @doc """
  Loads a LoRA or DoRA adapter from a folder, in one of two formats:

    * mlx-lm's: `adapters.safetensors` and `adapter_config.json`
    * PEFT's: `adapter_model.safetensors` and `adapter_config.json`; its scale is `lora_alpha / r`,
      with rsLoRA `lora_alpha / sqrt(r)`, for each module as `rank_pattern` and `alpha_pattern` say

  The path of a file of tensors works too, with `adapter_config.json` beside it: the checkpoint of
  a training (`0000100_adapters.safetensors`).

  An adapter is bound to a model when it is first used with it. Every tensor must then find its
  module with the right shape: else the answer is an error that lists all that do not.

  ## Options

    * `:scale` - takes the place of what `adapter_config.json` says, for every module

  ## Examples

      {:ok, adapter} = Bombus.load_adapter({:local, "adapters/my-posts"}, scale: 20.0)
  """
  @spec load_adapter(source(), keyword()) :: {:ok, Adapter.t()} | {:error, Error.t()}
  def load_adapter(source, options \\ []) do
    options = options!(options, [:scale, :on_progress])
    scale = scale!(options[:scale])
    on_progress = Hub.Options.on_progress!(options[:on_progress])

    Telemetry.load(:adapter, source, fn ->
      with {:ok, path} <- Source.resolve(source, :adapter, on_progress),
           {:ok, loaded} <- Native.await(&Native.load_adapter(path, scale, &1)) do
        {ref, rank, scale} = loaded
        {:ok, %Adapter{ref: ref, rank: rank, scale: scale}}
      end
    end)
  end

  @doc "As `load_adapter/2`, but returns the adapter or raises."
  @spec load_adapter!(source(), keyword()) :: Adapter.t()
  def load_adapter!(source, options \\ []), do: Error.unwrap!(load_adapter(source, options))

  @doc """
  Loads a tokenizer: a folder with `tokenizer.json`, and the chat template beside it.

  ## Examples

      {:ok, tokenizer} = Bombus.load_tokenizer({:local, "models/Qwen3-8B-MLX-4bit"})
  """
  @spec load_tokenizer(source(), keyword()) :: {:ok, Tokenizer.t()} | {:error, Error.t()}
  def load_tokenizer(source, options \\ []) do
    options = options!(options, [:on_progress])
    on_progress = Hub.Options.on_progress!(options[:on_progress])

    Telemetry.load(:tokenizer, source, fn ->
      with {:ok, path} <- Source.resolve(source, :tokenizer, on_progress),
           {:ok, loaded} <- Native.await(&Native.load_tokenizer(path, &1)) do
        {ref, vocab_size, chat_template?} = loaded
        {:ok, %Tokenizer{ref: ref, vocab_size: vocab_size, chat_template?: chat_template?}}
      end
    end)
  end

  @doc "As `load_tokenizer/2`, but returns the tokenizer or raises."
  @spec load_tokenizer!(source(), keyword()) :: Tokenizer.t()
  def load_tokenizer!(source, options \\ []), do: Error.unwrap!(load_tokenizer(source, options))

  @doc """
  The log-probabilities of a text, given as token ids: `ln p(token i | the tokens before it)`.

  For `n` ids there are `n - 1` numbers (floats, at most 0), since nothing comes before the first.

  ## Options

    * `:adapter` - an adapter to score with; none by default

  ## Examples

      {:ok, logprobs} = Bombus.score(model, [1, 15, 27], adapter: adapter)
  """
  @spec score(Model.t(), [non_neg_integer()], keyword()) :: {:ok, [float()]} | {:error, Error.t()}
  def score(model, token_ids, options \\ [])

  def score(%Model{} = model, token_ids, options) do
    options = options!(options, [:adapter])
    Bombus.Serving.Input.token_ids!(token_ids, model)
    adapter = Bombus.Serving.Options.adapter!(options[:adapter])
    score = &Native.score(model.ref, token_ids, adapter && adapter.ref, &1)
    with {:scores, log_probs} <- Native.await(score, &Native.cancel/1), do: {:ok, log_probs}
  end

  def score(other, _token_ids, _options) do
    raise ArgumentError, "expected a model made by Bombus.load_model/2, got: #{inspect(other)}"
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
  @spec memory_info() :: %{atom() => non_neg_integer()}
  def memory_info, do: Native.memory_info() |> Error.from_native() |> Error.unwrap!()

  @of_sources [:revision, :cache_dir, :auth_token, :offline, :subdir]

  @doc false
  def options!(options, known) do
    unless Keyword.keyword?(options) do
      raise ArgumentError, "expected the options to be a keyword list, got: #{inspect(options)}"
    end

    # A value may be a token.
    case Enum.filter(Keyword.keys(options) -- known, &(&1 in @of_sources)) do
      [] ->
        Keyword.validate!(options, known)

      misplaced ->
        raise ArgumentError,
              "expected #{inspect(misplaced)} in the source: {:hf, \"owner/name\", options}"
    end
  end

  @doc false
  def device!(options) do
    case options[:device] || backend_device!(options[:backend]) do
      device when device in [:auto, :gpu, :cpu] ->
        device

      {:mlx, :cpu} ->
        :mlx_cpu

      other ->
        raise ArgumentError,
              "expected :device to be :auto, :gpu, :cpu or {:mlx, :cpu}, got: #{inspect(other)}"
    end
  end

  defp backend_device!(module) when is_atom(module), do: :auto

  defp backend_device!(backend) do
    with {module, options} when is_atom(module) <- backend,
         true <- Keyword.keyword?(options) do
      Keyword.get(options, :device, :auto)
    else
      _other ->
        raise ArgumentError,
              "expected :backend to be a module or {module, device: device}, " <>
                "got: #{inspect(backend)}"
    end
  end

  defp positive!(options, key, most \\ 0x7FFFFFFF), do: limit!(options, key, 1, most)

  defp limit!(options, key, least, most \\ 0x7FFFFFFFFFFF) do
    case Keyword.fetch!(options, key) do
      value when is_integer(value) and value in least..most//1 ->
        value

      other ->
        raise ArgumentError,
              "expected #{inspect(key)} to be a whole number in #{least}..#{most}, " <>
                "got: #{inspect(other)}"
    end
  end

  # The engine computes in float32.
  @largest 3.4e38

  defp scale!(nil), do: nil
  defp scale!(scale) when is_number(scale) and abs(scale) <= @largest, do: scale * 1.0

  defp scale!(other) do
    raise ArgumentError, "expected :scale to be a number within float32, got: #{inspect(other)}"
  end

  @bits %{int2: 2, int3: 3, int4: 4, int5: 5, int6: 6, int8: 8}

  # -> the bits, and the group size where that is given
  defp quantization!(nil), do: nil
  defp quantization!(name) when is_map_key(@bits, name), do: %{bits: @bits[name]}

  defp quantization!(options) do
    with true <-
           Keyword.keyword?(options) and Keyword.keys(options) -- [:bits, :group_size] == [],
         %{bits: bits} = wanted when bits in [2, 3, 4, 5, 6, 8] <- Map.new(options),
         true <- Map.get(wanted, :group_size, 64) in [32, 64, 128] do
      wanted
    else
      _other ->
        raise ArgumentError,
              "expected :quantization to be one of #{inspect(Map.keys(@bits))}, or bits: (2 to 6, 8) and " <>
                "group_size: (32, 64, 128), got: #{inspect(options)}"
    end
  end

  defp check_quantization(model, nil), do: {:ok, model}

  defp check_quantization(%{quantization: quantization} = model, wanted) do
    if Map.take(quantization, Map.keys(wanted)) == wanted do
      {:ok, model}
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
