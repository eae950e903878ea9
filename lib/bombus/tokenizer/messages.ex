defmodule Bombus.Tokenizer.Messages do
  @moduledoc false
  # A conversation and what its chat template takes, as JSON text in an order of its own.

  import Bombus.OrderedJSON, only: [encode: 2, object?: 1, pairs: 2]

  alias Bombus.{Error, Tokenizer}

  @always ~w(add_generation_prompt chat_template continue_final_message)

  @doc """
  Messages and template options as a prompt for the NIF, or the error of a text that is none.
  Raises for what the caller's code got wrong.
  """
  @spec prompt(term(), map(), Tokenizer.t()) ::
          {:ok, {:chat, String.t(), String.t()}} | {:error, Error.t()}
  def prompt([], _options, _tokenizer),
    do: Error.error(:bad_request, "expected at least one message, got none")

  def prompt(messages, options, tokenizer) do
    unless Bombus.Options.proper_list?(messages) do
      raise ArgumentError, "expected :messages to be a list of messages, got: #{show(messages)}"
    end

    options_known!(options, tokenizer)
    options = options!(options)
    messages = messages |> Enum.map(&message!/1) |> encode(:message) |> IO.iodata_to_binary()
    {:ok, {:chat, messages, options}}
  catch
    {:not_text, text} ->
      Error.error(:bad_request, "expected a text in UTF-8, got: #{show(text)}")

    {:not_json, term} ->
      raise ArgumentError, "expected a message to be of what JSON has, got: #{show(term)}"

    {:name_twice, object} ->
      raise ArgumentError,
            "expected every name once, as an atom or a string, got: #{show(object)}"
  end

  # Names and values that JSON has.
  defp options?(options) do
    _json = encode(options, :options)
    true
  catch
    {:not_text, _text} -> true
    {kind, _term} when kind in [:not_json, :name_twice] -> false
  end

  @doc "The type of the option `:template_options`."
  def check_options(options) do
    if is_non_struct_map(options) or Keyword.keyword?(options),
      do: checked(Map.new(options)),
      else: {:error, "a map or a keyword list"}
  end

  defp checked(options) do
    name = options[:chat_template] || options["chat_template"]

    cond do
      not options?(options) ->
        {:error, "names and values as in JSON"}

      not (is_atom(name) or is_binary(name)) ->
        {:error, "names and values, :chat_template the name of a template"}

      true ->
        {:ok, options}
    end
  end

  @doc "Raises for an option that no template looks at, which would be without effect."
  @spec options_known!(map(), Tokenizer.t() | nil) :: :ok
  def options_known!(_options, nil), do: :ok

  def options_known!(options, %{template_options: known}) do
    names =
      options |> Map.new(fn {name, value} -> {to_string(name), value} end) |> Map.drop(@always)

    case Enum.find(names, fn {name, value} -> name not in known and value != nil end) do
      nil ->
        :ok

      {name, _value} ->
        raise ArgumentError,
              "the chat template has no option #{name}, so it would be without effect: " <>
                "expected one of #{Enum.join(Enum.uniq(known ++ @always), ", ")}"
    end
  end

  defp options!(options) do
    options
    |> Map.new(fn {name, value} -> {to_string(name), value} end)
    |> Map.replace_lazy("tools", &tools!/1)
    |> encode(:options)
    |> IO.iodata_to_binary()
  end

  defp tools!(nil), do: nil

  defp tools!(text) when is_binary(text) do
    case JSON.decode(text) do
      {:ok, tools} when is_list(tools) -> {:json, text}
      _other -> bad_tools!(text)
    end
  end

  defp tools!(tools) do
    if Bombus.Options.proper_list?(tools), do: Enum.map(tools, &tool!/1), else: bad_tools!(tools)
  end

  defp tool!(text) when is_binary(text) do
    case JSON.decode(text) do
      {:ok, %{}} -> {:json, text}
      _other -> bad_tools!(text)
    end
  end

  defp tool!(tool), do: if(object?(tool), do: tool, else: bad_tools!(tool))

  defp bad_tools!(tools) do
    raise ArgumentError,
          "expected :tools to be a list of %{type: \"function\", function: %{name: ..., " <>
            "description: ..., parameters: ...}}, or its JSON text, got: #{show(tools)}"
  end

  # -> the pairs of a message, its content a text, or a list of parts that are texts
  defp message!(message) do
    unless object?(message), do: bad_message!(message)
    fields = pairs(message, :message)

    case List.keyfind(fields, "role", 0) do
      {"role", role} when is_binary(role) or (is_atom(role) and role not in [nil, true, false]) ->
        content!(fields, message)

      _other ->
        bad_message!(message)
    end
  end

  defp content!(fields, message) do
    case List.keyfind(fields, "content", 0) do
      {"content", content} ->
        List.keyreplace(fields, "content", 0, {"content", texts!(content, message)})

      # As mlx_lm.server: a message that only calls tools has no text.
      nil ->
        if Enum.any?(fields, &speaks?/1),
          do: fields ++ [{"content", ""}],
          else: bad_message!(message)
    end
  end

  defp speaks?({name, value}),
    do: name in ~w(tool_calls reasoning_content thinking reasoning) and value not in [nil, []]

  defp texts!(nil, _message), do: ""
  defp texts!(text, _message) when is_binary(text), do: text

  defp texts!(parts, message) when is_list(parts) do
    if parts != [] and object?(parts), do: bad_message!(message)
    unless Bombus.Options.proper_list?(parts), do: bad_message!(message)
    Enum.map(parts, &part!(&1, message))
  end

  defp texts!(_other, message), do: bad_message!(message)

  defp part!(part, message) do
    unless object?(part), do: bad_message!(message)
    fields = Map.new(pairs(part, :any))

    case fields do
      %{"type" => type, "text" => text} when type in ["text", :text] and is_binary(text) ->
        part

      %{"type" => type} when type not in ["text", :text] ->
        raise ArgumentError,
              "expected a message's content to be text, got a part of type #{show(type)}: " <>
                "Bombus has language models only"

      _other ->
        bad_message!(message)
    end
  end

  defp bad_message!(message) do
    raise ArgumentError,
          "expected a message to be %{role: \"user\", content: \"...\"}, its content a string, a " <>
            "list of %{type: \"text\", text: \"...\"}, or nil, got: #{show(message)}"
  end

  defp show(term), do: Bombus.Options.show(term)
end
