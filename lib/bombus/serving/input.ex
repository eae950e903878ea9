defmodule Bombus.Serving.Input do
  @moduledoc false
  # What a request begins with: a string, or a map with :text, :messages or :token_ids and the
  # request's options beside it.

  alias Bombus.{Model, Serving, Tokenizer}
  alias Bombus.Serving.Options

  @prompts [:text, :messages, :token_ids]

  @doc "An input as `{prompt, options}` for the NIF."
  def normalize!(text, %Serving{} = serving) when is_binary(text) do
    normalize!(%{text: text}, serving)
  end

  def normalize!(%{} = input, %Serving{} = serving) when not is_struct(input) do
    {prompt, options} = Map.split(input, @prompts)
    options = Options.merge!(serving.options, options)
    check_options!(options, serving)

    case Map.to_list(prompt) do
      [one] -> {prompt!(one, options, serving), options}
      _none_or_several -> raise ArgumentError, expected(input)
    end
  end

  def normalize!(other, _serving), do: raise(ArgumentError, expected(other))

  # What only shows beside a model and a tokenizer.
  defp check_options!(%{stop: [_ | _] = stop}, %{tokenizer: nil}) do
    raise ArgumentError,
          "a serving without a tokenizer has no text for :stop, got: #{inspect(stop)}"
  end

  defp check_options!(%{logit_bias: biases}, _serving) when biases == %{}, do: :ok

  defp check_options!(%{logit_bias: biases}, serving) do
    token_ids!(Map.keys(biases), serving.model)
    :ok
  end

  @doc "Raises where the ids are no token ids of the model."
  def token_ids!([_ | _] = ids, %Model{spec: %{vocab_size: vocab_size}}) do
    case Enum.reject(ids, &(is_integer(&1) and &1 >= 0 and &1 < vocab_size)) do
      [] ->
        ids

      [wrong | _] ->
        raise ArgumentError,
              "expected token ids in 0..#{vocab_size - 1}, got: #{inspect(wrong)}"
    end
  end

  def token_ids!(other, _model) do
    raise ArgumentError, "expected a list of at least one token id, got: #{inspect(other)}"
  end

  defp prompt!({:token_ids, ids}, _options, serving) do
    {:ids, token_ids!(ids, serving.model)}
  end

  defp prompt!({kind, _value}, _options, %{tokenizer: nil}) do
    raise ArgumentError,
          "a serving without a tokenizer takes :token_ids only, got: #{inspect(kind)}"
  end

  defp prompt!({:text, text}, options, serving) do
    text = text!(text)

    if options.chat_template and serving.tokenizer.chat_template? do
      chat([%{role: "user", content: text}], options)
    else
      {:text, text}
    end
  end

  defp prompt!({:messages, messages}, options, %{tokenizer: tokenizer}) do
    unless options.chat_template and match?(%Tokenizer{chat_template?: true}, tokenizer) do
      raise ArgumentError, "expected :text, since :messages need a chat template"
    end

    chat(messages!(messages), options)
  end

  defp chat(messages, options) do
    {:chat, json!(messages), JSON.encode!(options.template_options)}
  end

  defp json!(messages) do
    JSON.encode!(messages)
  rescue
    _error -> bad_message!(messages)
  end

  defp text!(text) do
    cond do
      not is_binary(text) ->
        raise ArgumentError, "expected :text to be a string, got: #{inspect(text)}"

      text == "" ->
        raise ArgumentError, "expected :text not to be empty"

      not String.valid?(text) ->
        raise ArgumentError, "expected :text to be valid UTF-8, got: #{inspect(text)}"

      true ->
        text
    end
  end

  defp messages!([_ | _] = messages), do: Enum.map(messages, &message!/1)

  defp messages!(other) do
    raise ArgumentError, "expected :messages to be a list of messages, got: #{inspect(other)}"
  end

  defp message!(%{} = message) when not is_struct(message) do
    message = Map.new(message, fn {key, value} -> {to_string(key), value} end)

    case message do
      %{"role" => role, "content" => content} when is_binary(role) and is_binary(content) ->
        if String.valid?(role) and String.valid?(content),
          do: message,
          else: bad_message!(message)

      _other ->
        bad_message!(message)
    end
  end

  defp message!(other), do: bad_message!(other)

  defp bad_message!(message) do
    raise ArgumentError,
          "expected a message to be %{role: \"user\", content: \"...\"}, strings in valid UTF-8, got: " <>
            inspect(message)
  end

  defp expected(input) do
    "expected an input to be a string, or a map with exactly one of :text, :messages and " <>
      ":token_ids, " <>
      "got: #{inspect(input)}"
  end
end
