defmodule Bombus.Serving.Options do
  @moduledoc false
  # The options of a serving and of a request: checked here, before anything reaches Rust.

  alias Bombus.{Adapter, Model}

  @defaults [
    max_new_tokens: 256,
    temperature: 0,
    top_p: 1.0,
    top_k: 0,
    min_p: 0.0,
    repetition_penalty: 1.0,
    seed: nil,
    stop: [],
    adapter: nil,
    chat_template: true,
    template_options: %{},
    stream: false,
    stream_done: false,
    compile: []
  ]

  @keys Keyword.keys(@defaults)

  @doc "A serving's options over the repository's over the defaults."
  def new!(options, %Model{generation_config: generation_config}) do
    @defaults
    |> Map.new()
    |> Map.merge(from_repository(generation_config))
    |> merge!(options)
  end

  @doc "A request's options over a serving's."
  def merge!(base, options) do
    Enum.reduce(options, base, fn {key, value}, merged ->
      Map.put(merged, key, check!(key, value))
    end)
  end

  @doc "What the NIF takes."
  def to_native(options) do
    %{
      max_new_tokens: options.max_new_tokens,
      max_context: options.compile[:sequence_length],
      temperature: options.temperature * 1.0,
      top_k: options.top_k,
      top_p: options.top_p * 1.0,
      min_p: options.min_p * 1.0,
      repetition_penalty: options.repetition_penalty * 1.0,
      seed: options.seed || :rand.uniform(0x1_0000_0000_0000_0000) - 1,
      stop: options.stop
    }
  end

  def adapter!(nil), do: nil
  def adapter!(%Adapter{} = adapter), do: adapter

  def adapter!(other) do
    raise ArgumentError,
          "expected :adapter to be made by Bombus.load_adapter/2, or nil, got: #{inspect(other)}"
  end

  # generation_config.json is the repository's: what is no valid option there is left out, not
  # raised. As in transformers, its sampling counts only where it says do_sample.
  defp from_repository(config) do
    sampled = %{
      temperature: config["temperature"] || 1.0,
      top_p: config["top_p"],
      top_k: config["top_k"],
      min_p: config["min_p"]
    }

    sampled = if config["do_sample"] == true, do: sampled, else: %{}

    for {key, value} <- Map.put(sampled, :repetition_penalty, config["repetition_penalty"]),
        value != nil and valid?(key, value),
        into: %{},
        do: {key, value}
  end

  defp check!(key, _value) when key not in @keys do
    raise ArgumentError,
          "unknown option #{inspect(key)}, expected one of #{Enum.map_join(@keys, ", ", &inspect/1)}" <>
            " (and for an input one of :text, :messages and :token_ids)"
  end

  defp check!(:adapter, value), do: adapter!(value)
  defp check!(:compile, nil), do: []
  defp check!(:stop, value) when is_binary(value), do: check!(:stop, [value])
  defp check!(:template_options, value) when is_list(value), do: check_template_options!(value)
  defp check!(:template_options, value) when is_map(value), do: check_template_options!(value)

  defp check!(key, value) do
    if valid?(key, value) do
      value
    else
      raise ArgumentError,
            "expected #{inspect(key)} to be #{expected(key)}, got: #{inspect(value)}"
    end
  end

  defp check_template_options!(options) do
    _json = JSON.encode!(Map.new(options))
    Map.new(options)
  rescue
    _error ->
      raise ArgumentError,
            "expected :template_options to be names and values as in JSON, got: #{inspect(options)}"
  end

  defp valid?(:max_new_tokens, value), do: is_integer(value) and value in 0..0x7FFFFFFF
  defp valid?(:temperature, value), do: is_number(value) and value >= 0 and value < 1.0e6
  defp valid?(:top_p, value), do: is_number(value) and value >= 0 and value <= 1
  defp valid?(:top_k, value), do: is_integer(value) and value in 0..0x7FFFFFFF
  defp valid?(:min_p, value), do: is_number(value) and value >= 0 and value <= 1
  defp valid?(:repetition_penalty, value), do: is_number(value) and value > 0 and value < 1.0e6
  defp valid?(:seed, nil), do: true
  defp valid?(:seed, value), do: is_integer(value) and value in 0..0xFFFFFFFFFFFFFFFF
  defp valid?(:chat_template, value), do: is_boolean(value)
  defp valid?(:stream, value), do: is_boolean(value)
  defp valid?(:stream_done, value), do: is_boolean(value)

  defp valid?(:compile, value) do
    Keyword.keyword?(value) and
      Enum.all?(value, fn {key, size} ->
        key in [:batch_size, :sequence_length] and is_integer(size) and size > 0
      end)
  end

  defp valid?(:template_options, _value), do: false

  defp valid?(:stop, value) do
    is_list(value) and Enum.all?(value, &(is_binary(&1) and &1 != "" and String.valid?(&1)))
  end

  defp expected(:max_new_tokens), do: "a whole number, 0 or above"
  defp expected(:temperature), do: "a number, 0 (greedy) or above, below 1.0e6"
  defp expected(:top_p), do: "in 0.0..1.0"
  defp expected(:top_k), do: "a whole number, 0 (all tokens) or above"
  defp expected(:min_p), do: "in 0.0..1.0"
  defp expected(:repetition_penalty), do: "a number above 0"
  defp expected(:seed), do: "a whole number in 0..2**64-1, or nil"
  defp expected(:stop), do: "a string or a list of strings, none of them empty"
  defp expected(:compile), do: "[batch_size: n, sequence_length: n]"
  defp expected(:template_options), do: "a map or a keyword list"
  defp expected(_flag), do: "true or false"
end
