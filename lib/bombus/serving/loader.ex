defmodule Bombus.Serving.Loader do
  @moduledoc false
  # From the options of a child to its serving: a serving, or a model (loaded here where it is a
  # source) with what belongs to it.

  alias Bombus.{Adapter, Error, Model, Native, Serving, Source, Tokenizer}
  alias Bombus.Serving.Options

  @own [:name, :drain]
  @limits [:max_batch_size, :max_queue, :prefill_chunk, :max_context]
  @load [:device, :backend, :threads, :quantization, :prefix_cache] ++ @limits

  @doc "Raises what is wrong with the options, as far as it shows before anything is loaded."
  def check!(options) do
    unless Keyword.keyword?(options) do
      raise ArgumentError,
            "expected a keyword list with serving: or model:, and name:, got: #{inspect(options)}"
    end

    unless options[:name],
      do: raise(ArgumentError, "expected :name among the options of a serving")

    drain!(Keyword.get(options, :drain, 0))

    case {options[:serving], options[:model]} do
      {nil, nil} ->
        raise ArgumentError, "expected :serving or :model among the options of a serving"

      {%Serving{}, nil} ->
        Keyword.validate!(options, [:serving | @own])

      {other, nil} ->
        raise ArgumentError,
              "expected a serving made by Bombus.Serving.new/3, got: #{inspect(other)}"

      {nil, %Model{}} ->
        unless Keyword.has_key?(options, :tokenizer) do
          raise ArgumentError, "expected :tokenizer beside a model that is loaded, nil for none"
        end

        Bombus.options!(options, @own ++ [:model, :tokenizer] ++ @limits ++ Options.keys())

      {nil, _source} ->
        Bombus.options!(options, @own ++ [:model, :tokenizer] ++ @load ++ Options.keys())

      {_serving, _model} ->
        raise ArgumentError, "expected :serving or :model, got both"
    end
  end

  @doc "The options as they may be logged: supervisors show them."
  def hide_tokens(options) do
    Keyword.new(options, fn
      {key, source} when key in [:model, :tokenizer, :adapter] -> {key, Source.hide_token(source)}
      other -> other
    end)
  end

  @doc "Whether there is nothing to be loaded."
  def given?(options) do
    options[:serving] != nil or
      (match?(%Model{}, options[:model]) and
         (options[:tokenizer] == nil or match?(%Tokenizer{}, options[:tokenizer])) and
         (options[:adapter] == nil or match?(%Adapter{}, options[:adapter])))
  end

  @doc "The serving, where there is nothing to be loaded, or an error; else nil."
  @spec given(keyword()) :: {:ok, Serving.t()} | {:error, Error.t()} | nil
  def given(options), do: if(given?(options), do: serving(options, nil))

  @doc "Loads what is to be loaded. `on_progress` hears of downloads."
  @spec serving(keyword(), nil | (Bombus.Hub.progress() -> term())) ::
          {:ok, Serving.t()} | {:error, Error.t()}
  def serving(options, on_progress) do
    with {:ok, serving} <- made(options, on_progress),
         :ok <- check_adapter(serving.model, serving.options.adapter),
         do: {:ok, serving}
  rescue
    # What only shows beside the files. A mistake in the options has been raised before.
    error in ArgumentError -> Error.error(:bad_request, Exception.message(error))
  end

  defp made(options, on_progress) do
    told = &tell_both(&1, on_progress)

    with nil <- options[:serving],
         {:ok, model} <- model(options[:model], Keyword.take(options, @load), told),
         {:ok, tokenizer} <- tokenizer(Keyword.get(options, :tokenizer, options[:model]), told),
         {:ok, adapter} <- adapter(options[:adapter], told) do
      # A model that was loaded here has its limits already.
      limits = if match?(%Model{}, options[:model]), do: @limits, else: []
      own = Keyword.take(options, Options.keys() ++ limits)
      {:ok, Serving.new(model, tokenizer, Keyword.put(own, :adapter, adapter))}
    else
      %Serving{} = serving -> {:ok, serving}
      {:error, error} -> {:error, error}
    end
  end

  defp model(%Model{} = model, _options, _told), do: {:ok, model}
  defp model(source, options, told), do: Bombus.load_model(source, options ++ told.(source))

  defp tokenizer(nil, _told), do: {:ok, nil}
  defp tokenizer(%Tokenizer{} = tokenizer, _told), do: {:ok, tokenizer}
  defp tokenizer(source, told), do: Bombus.load_tokenizer(source, told.(source))

  defp adapter(nil, _told), do: {:ok, nil}
  defp adapter(%Adapter{} = adapter, _told), do: {:ok, adapter}
  defp adapter(source, told), do: Bombus.load_adapter(source, told.(source))

  # A source may have a function of its own, which that of the call would take the place of.
  defp tell_both({:hf, _id, [_ | _] = options}, on_progress) do
    case options[:on_progress] do
      own when is_function(own, 1) -> [on_progress: &{on_progress.(&1), own.(&1)}]
      _none -> [on_progress: on_progress]
    end
  end

  defp tell_both(_source, on_progress), do: [on_progress: on_progress]

  defp check_adapter(_model, nil), do: :ok

  defp check_adapter(model, adapter),
    do: Native.await(&Native.check_adapter(model.ref, adapter.ref, &1))

  defp drain!(:infinity), do: :ok
  defp drain!(drain) when is_integer(drain) and drain >= 0, do: :ok

  defp drain!(other) do
    raise ArgumentError, "expected :drain to be milliseconds or :infinity, got: #{inspect(other)}"
  end
end
