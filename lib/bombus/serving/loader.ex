defmodule Bombus.Serving.Loader do
  @moduledoc false
  # From the options of a child to its serving: a serving, or a model (loaded here where it is a
  # source) with what belongs to it.

  alias Bombus.{Adapter, Model, Serving, Source, Tokenizer}
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

  @spec serving(keyword()) :: {:ok, Serving.t()} | {:error, Bombus.Error.t()}
  def serving(options) do
    with nil <- options[:serving],
         {:ok, model} <- model(options[:model], Keyword.take(options, @load)),
         {:ok, tokenizer} <- tokenizer(Keyword.get(options, :tokenizer, options[:model])),
         {:ok, adapter} <- adapter(options[:adapter]) do
      # A model that was loaded here has its limits already.
      limits = if match?(%Model{}, options[:model]), do: @limits, else: []
      own = Keyword.take(options, Options.keys() ++ limits)
      {:ok, Serving.new(model, tokenizer, Keyword.put(own, :adapter, adapter))}
    else
      %Serving{} = serving -> {:ok, serving}
      {:error, error} -> {:error, error}
    end
  end

  defp model(%Model{} = model, _options), do: {:ok, model}
  defp model(source, options), do: Bombus.load_model(source, options)

  defp tokenizer(nil), do: {:ok, nil}
  defp tokenizer(%Tokenizer{} = tokenizer), do: {:ok, tokenizer}
  defp tokenizer(source), do: Bombus.load_tokenizer(source)

  defp adapter(nil), do: {:ok, nil}
  defp adapter(%Adapter{} = adapter), do: {:ok, adapter}
  defp adapter(source), do: Bombus.load_adapter(source)

  defp drain!(:infinity), do: :ok
  defp drain!(drain) when is_integer(drain) and drain >= 0, do: :ok

  defp drain!(other) do
    raise ArgumentError, "expected :drain to be milliseconds or :infinity, got: #{inspect(other)}"
  end
end
