defmodule Bombus.Serving.Options do
  @moduledoc false
  # The options of a serving and of a request: checked here, before anything reaches Rust.

  alias Bombus.{Adapter, Model}

  @defaults [
    max_new_tokens: 256,
    min_new_tokens: 0,
    max_context: nil,
    temperature: 0,
    top_p: 1.0,
    top_k: 0,
    min_p: 0.0,
    repetition_penalty: 1.0,
    presence_penalty: 0.0,
    frequency_penalty: 0.0,
    logit_bias: %{},
    logprobs: nil,
    seed: nil,
    stop: [],
    adapter: nil,
    chat_template: true,
    template_options: %{},
    timeout: nil,
    stream: false,
    stream_done: false,
    compile: []
  ]

  @keys Keyword.keys(@defaults)

  def keys, do: @keys

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
      min_new_tokens: options.min_new_tokens,
      max_context: max_context(options.max_context, options.compile[:sequence_length]),
      temperature: options.temperature * 1.0,
      top_k: options.top_k,
      top_p: options.top_p * 1.0,
      min_p: options.min_p * 1.0,
      repetition_penalty: options.repetition_penalty * 1.0,
      presence_penalty: options.presence_penalty * 1.0,
      frequency_penalty: options.frequency_penalty * 1.0,
      logit_bias: for({id, bias} <- options.logit_bias, do: {id, bias * 1.0}),
      logprobs: options.logprobs,
      seed: options.seed || :rand.uniform(0x1_0000_0000_0000_0000) - 1,
      stop: options.stop
    }
  end

  @doc "A timeout that was given beside a request, before its serving is known."
  def timeout!(value), do: check!(:timeout, value)

  # nil is above all numbers.
  defp max_context(one, other), do: min(one, other)

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

  defp check!(:logit_bias, value) when is_list(value) do
    if Keyword.keyword?(value) or not Enum.all?(value, &match?({_id, _bias}, &1)),
      do: wrong!(:logit_bias, value),
      else: check!(:logit_bias, Map.new(value))
  end

  defp check!(:stop, value) when is_binary(value), do: check!(:stop, [value])
  defp check!(:template_options, value) when is_list(value), do: check_template_options!(value)
  defp check!(:template_options, value) when is_map(value), do: check_template_options!(value)

  defp check!(key, value) do
    if valid?(key, value), do: value, else: wrong!(key, value)
  end

  defp wrong!(key, value) do
    raise ArgumentError, "expected #{inspect(key)} to be #{expected(key)}, got: #{inspect(value)}"
  end

  defp check_template_options!(options) do
    _json = JSON.encode!(Map.new(options))
    Map.new(options)
  rescue
    _error ->
      raise ArgumentError,
            "expected :template_options to be names and values as in JSON, got: #{inspect(options)}"
  end

  defp valid?(key, value) when key in [:max_new_tokens, :min_new_tokens],
    do: is_integer(value) and value in 0..0x7FFFFFFF

  defp valid?(:max_context, nil), do: true
  defp valid?(:max_context, value), do: is_integer(value) and value in 1..0x7FFFFFFF
  defp valid?(:temperature, value), do: is_number(value) and value >= 0 and value < 1.0e6
  defp valid?(:top_p, value), do: is_number(value) and value >= 0 and value <= 1
  defp valid?(:top_k, value), do: is_integer(value) and value in 0..0x7FFFFFFF
  defp valid?(:min_p, value), do: is_number(value) and value >= 0 and value <= 1
  defp valid?(:repetition_penalty, value), do: is_number(value) and value > 0 and value < 1.0e6

  defp valid?(key, value) when key in [:presence_penalty, :frequency_penalty],
    do: is_number(value) and abs(value) <= 1.0e6

  defp valid?(:logit_bias, %{} = biases) when not is_struct(biases) do
    Enum.all?(biases, fn {id, bias} ->
      is_integer(id) and id in 0..0xFFFFFFFF and is_number(bias) and abs(bias) <= 1.0e6
    end)
  end

  defp valid?(:logit_bias, _value), do: false
  defp valid?(:logprobs, nil), do: true
  defp valid?(:logprobs, value), do: is_integer(value) and value in 0..100
  defp valid?(:seed, nil), do: true
  defp valid?(:seed, value), do: is_integer(value) and value in 0..0xFFFFFFFFFFFFFFFF
  defp valid?(:chat_template, value), do: is_boolean(value)
  # What a timer of the BEAM takes.
  defp valid?(:timeout, value) when value in [nil, :infinity], do: true
  defp valid?(:timeout, value), do: is_integer(value) and value in 0..0xFFFFFFFF
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
  defp expected(:min_new_tokens), do: "a whole number, 0 or above"
  defp expected(:max_context), do: "a whole number above 0, or nil"
  defp expected(:temperature), do: "a number, 0 (greedy) or above, below 1.0e6"
  defp expected(:top_p), do: "in 0.0..1.0"
  defp expected(:top_k), do: "a whole number, 0 (all tokens) or above"
  defp expected(:min_p), do: "in 0.0..1.0"
  defp expected(:repetition_penalty), do: "a number above 0"
  defp expected(:presence_penalty), do: "a number, within 1.0e6 of 0"
  defp expected(:frequency_penalty), do: "a number, within 1.0e6 of 0"
  defp expected(:logit_bias), do: "a map from token ids to numbers within 1.0e6 of 0"
  defp expected(:logprobs), do: "a whole number in 0..100, or nil"
  defp expected(:seed), do: "a whole number in 0..2**64-1, or nil"
  defp expected(:stop), do: "a string or a list of strings, none of them empty"
  defp expected(:compile), do: "[batch_size: n, sequence_length: n]"
  defp expected(:timeout), do: "milliseconds, :infinity or nil"
  defp expected(:template_options), do: "a map or a keyword list"
  defp expected(_flag), do: "true or false"
end
