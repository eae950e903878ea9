defmodule Bombus.Serving.Options do
  @moduledoc false
  # The options of a serving and of a request: checked here, before anything reaches Rust.

  alias Bombus.{Adapter, Model, Options}
  alias Bombus.Serving.Format
  alias Bombus.Tokenizer.Messages

  @most 0x7FFFFFFF

  @schema [
    max_new_tokens: [
      type: {:integer, 0..@most},
      default: 256,
      doc: "how many tokens a text may have; the context of the model is a limit too"
    ],
    min_new_tokens: [
      type: {:integer, 0..@most},
      default: 0,
      doc: """
      before there are so many tokens, neither the model's own end of a text nor a token of `:stop` ends
      it; another stop string may. At most `:max_new_tokens`
      """
    ],
    max_context: [
      type: {:integer, 1..@most},
      by_default: "the model's context",
      doc: "how many tokens prompt and text may have together, within the model's context"
    ],
    temperature: [
      type: {:custom, {__MODULE__, :check_temperature}},
      type_spec: quote(do: number()),
      default: 0,
      doc: "0 is greedy; else in 1.0e-30..1.0e6"
    ],
    top_k: [
      type: {:integer, 0..@most},
      default: 0,
      doc: "only the k most probable tokens; 0 is all"
    ],
    top_p: [
      type: {:number, 0, 1},
      expected: "in 0.0..1.0",
      default: 1.0,
      doc: "only the most probable tokens that make up this share, in 0.0..1.0"
    ],
    min_p: [
      type: {:number, 0, 1},
      expected: "in 0.0..1.0",
      default: 0.0,
      doc: "only tokens with at least this share of the highest probability, in 0.0..1.0"
    ],
    repetition_penalty: [
      type: {:custom, {__MODULE__, :check_repetition_penalty}},
      type_spec: quote(do: number()),
      default: 1.0,
      doc: """
      divides the positive logits of tokens that were there before, and
      multiplies the negative ones; 1.0 is none. In 1.0e-6..1.0e6
      """
    ],
    presence_penalty: [
      type: {:number, -1.0e6, 1.0e6},
      expected: "a number, within 1.0e6 of 0",
      default: 0.0,
      doc: "taken from the logits of tokens that were generated before; 0.0 is none"
    ],
    frequency_penalty: [
      type: {:number, -1.0e6, 1.0e6},
      expected: "a number, within 1.0e6 of 0",
      default: 0.0,
      doc: "the same, once for each time; 0.0 is none"
    ],
    logit_bias: [
      type: {:custom, {__MODULE__, :check_logit_bias}},
      type_spec: quote(do: %{Bombus.Tokenizer.token_id() => number()}),
      default: %{},
      doc: "`%{token_id => number}`: added to the logits of these tokens; -1.0e6 bans one"
    ],
    logprobs: [
      type: {:integer, 0..100},
      expected: "a whole number in 0..100, or nil",
      doc: """
      a number n: the result says for every token how probable the model
      found it, and which n it found most probable
      """
    ],
    seed: [
      type: {:integer, 0..0xFFFFFFFFFFFFFFFF},
      expected: "a whole number in 0..2**64-1, or nil",
      by_default: "random",
      doc: "the same seed draws the same text"
    ],
    stop: [
      type: {:custom, {__MODULE__, :check_stop}},
      type_spec: quote(do: Bombus.Serving.stop() | [Bombus.Serving.stop()]),
      default: [],
      doc: """
      what ends the text, and is not part of it, such as
      `["\\n\\n", "<|im_end|>", 151645]`. A string that is one special token of the tokenizer is that
      token, as in mlx_lm.server. Strings need a tokenizer. At most 1024, and 64 KiB of strings. A
      charlist is a list of numbers and no text: two or more that are all ASCII are refused beside a
      tokenizer
      """
    ],
    format: [
      type: {:custom, {Format, :check}},
      type_spec: quote(do: Bombus.Serving.format()),
      by_default: "none: any text",
      doc: """
      what a text must be, and then is, unless `:max_new_tokens` or a `:stop` cuts it short: `:json` (an
      object), `{:json_schema, schema}` (a map, a keyword list, whose order the names then have, or JSON
      text), `{:regex, "(yes|no)"}` or `{:grammar, lark}`. See the guide "Structured output". Needs a
      tokenizer
      """
    ],
    adapter: [
      type: {:custom, {__MODULE__, :check_adapter}},
      type_spec: quote(do: Bombus.Adapter.t()),
      by_default: "none",
      doc: "made by `Bombus.load_adapter/2`"
    ],
    chat_template: [
      type: :boolean,
      default: true,
      doc: "`false` completes a string as it stands"
    ],
    template_options: [
      type: {:custom, {Messages, :check_options}},
      type_spec: quote(do: Bombus.Tokenizer.template_options()),
      default: %{},
      doc: """
      what the chat template takes, such as `%{enable_thinking: false}`: names that it knows
      (`tokenizer.template_options`), and what every template takes: `add_generation_prompt: false`,
      `continue_final_message: true` (or a field's name: the text goes on in the last message) and
      `chat_template` (the name of one where there are several). Where the template names them, `tools`
      are a list of maps or keyword lists, or JSON text, and `documents` a list of maps. Lists of pairs
      keep their order; maps have the order of OpenAI's documents. Whole numbers are exact within 128
      bits, and values may be nested 120 deep
      """
    ],
    timeout: [
      # What a timer of the BEAM takes.
      type: {:or, [{:in, [:infinity]}, {:integer, 0..0xFFFFFFFF}]},
      type_spec: quote(do: timeout()),
      expected: "milliseconds, :infinity or nil",
      by_default: "none; 60 s for a model that still loads",
      doc: "after how many milliseconds a request ends with the error `:timeout`"
    ],
    stream: [
      type: :boolean,
      default: false,
      doc: "`true` makes `run/2` and `batched_run/2` return a stream"
    ],
    stream_done: [
      type: :boolean,
      default: false,
      doc: "`true` ends a stream with `{:done, result}`"
    ],
    compile: [
      type: {:custom, {__MODULE__, :check_compile}},
      type_spec: quote(do: [{:batch_size | :sequence_length, pos_integer()}]),
      default: [],
      doc: """
      as in Bumblebee, `[batch_size: n, sequence_length: n]`: `:sequence_length` bounds
      prompt and text together, beside the model's context; nothing is compiled
      """
    ]
  ]

  @keys Keyword.keys(@schema)

  @limits for {name, entry} <- Model.Options.limits(),
              do: {name, Keyword.put(entry, :by_default, "the model's")}

  @doc "The limits of a serving alone, within the model's."
  def limits, do: @limits

  @doc "The options of a serving and of each of its requests."
  def schema, do: @schema

  def keys, do: @keys

  @doc "A serving's options over the repository's over the defaults."
  def new!(options, %Model{generation_config: generation_config}) do
    defaults()
    |> Map.merge(from_repository(generation_config))
    |> merge!(options)
  end

  @doc "Raises for those of a serving that has no model yet."
  def check!(options) do
    merge!(defaults(), options)
    :ok
  end

  defp defaults, do: for({key, entry} <- @schema, into: %{}, do: {key, entry[:default]})

  @doc "The options that are not the defaults."
  @spec changed(map()) :: keyword()
  def changed(options) do
    for {key, entry} <- @schema, options[key] != entry[:default], do: {key, options[key]}
  end

  @doc "A request's options over a serving's; those of the request are in the table."
  def merge!(base, options) do
    options
    |> Enum.reduce(base, fn {key, value}, merged ->
      Map.put(merged, key, Options.value!(key, value, @schema[key]))
    end)
    |> lengths!()
  end

  defp lengths!(%{min_new_tokens: least, max_new_tokens: most}) when least > most do
    raise ArgumentError,
          "expected :min_new_tokens to be at most :max_new_tokens, which is #{most}, got: #{least}"
  end

  defp lengths!(options), do: options

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
      stop: Enum.filter(options.stop, &is_binary/1),
      stop_ids: Enum.filter(options.stop, &is_integer/1),
      format: options.format
    }
  end

  @doc "A timeout that was given beside a request, before its serving is known."
  def timeout!(value), do: Options.value!(:timeout, value, @schema[:timeout])

  # nil is above all numbers.
  defp max_context(one, other), do: min(one, other)

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
        value != nil and Options.valid?(value, @schema[key]),
        into: %{},
        do: {key, value}
  end

  @doc false
  def check_temperature(value) do
    if is_number(value) and (value == 0 or (value >= 1.0e-30 and value <= 1.0e6)),
      do: {:ok, value},
      else: {:error, "a number, 0 (greedy) or above, in 1.0e-30..1.0e6"}
  end

  @doc false
  def check_repetition_penalty(value) do
    if is_number(value) and value >= 1.0e-6 and value <= 1.0e6,
      do: {:ok, value},
      else: {:error, "a number above 0, in 1.0e-6..1.0e6"}
  end

  @doc false
  def check_logit_bias(biases) do
    pairs = if is_non_struct_map(biases), do: Map.to_list(biases), else: biases

    if Options.proper_list?(pairs) and Enum.all?(pairs, &bias?/1),
      do: {:ok, Map.new(pairs)},
      else: {:error, "a map from token ids to numbers within 1.0e6 of 0"}
  end

  defp bias?({id, bias}) do
    is_integer(id) and id in 0..0xFFFFFFFF and is_number(bias) and abs(bias) <= 1.0e6
  end

  defp bias?(_other), do: false

  @doc false
  def check_stop(stop) when is_binary(stop) or is_integer(stop), do: check_stop([stop])

  def check_stop(stops) do
    cond do
      not (Options.proper_list?(stops) and Enum.all?(stops, &stop?/1)) ->
        {:error, "a string, a token id, or a list of them, none of them empty"}

      length(stops) > 1024 or bytes(stops) > 65_536 ->
        {:error, "at most 1024 strings and token ids, with 65536 bytes together"}

      true ->
        {:ok, stops}
    end
  end

  defp stop?(stop) when is_integer(stop), do: stop in 0..0xFFFFFFFF
  defp stop?(stop), do: is_binary(stop) and stop != "" and String.valid?(stop)

  defp bytes(stops),
    do: for(stop <- stops, is_binary(stop), reduce: 0, do: (all -> all + byte_size(stop)))

  @doc false
  # On which node it must be shows beside a model.
  def check_adapter(nil), do: {:ok, nil}

  def check_adapter(%Adapter{ref: ref} = adapter) when is_reference(ref) do
    if node(ref) == node(),
      do: {:ok, Options.handle!(adapter, Adapter)},
      else: {:ok, adapter}
  end

  def check_adapter(_other), do: {:error, "made by Bombus.load_adapter/2, or nil"}

  @doc false
  def check_compile(nil), do: {:ok, []}

  def check_compile(sizes) do
    if Keyword.keyword?(sizes) and Enum.all?(sizes, &size?/1),
      do: {:ok, sizes},
      else: {:error, "[batch_size: n, sequence_length: n], whole numbers in 1..#{@most}"}
  end

  defp size?({key, size}),
    do: key in [:batch_size, :sequence_length] and is_integer(size) and size in 1..@most
end
