defmodule Bombus.Training.LoRA.Row do
  @moduledoc false
  # A row of a caller's data, as the conversation that mlx_lm reads, or why it is left out.

  @fields ~w(messages prompt completion text tools)
  # What templates read of a message. A struct has other fields too, such as Ecto's `__meta__`.
  @message_fields ~w(role content name tool_calls tool_call_id reasoning_content)
  @no_row "it is neither a text nor a row with prompt and completion, messages or text"

  @doc "A row as `{:ok, object}`, whose keys are texts, or `{:skip, reason}`."
  @spec conversation(term(), map()) :: {:ok, map()} | {:skip, String.t()}
  def conversation(row, options) do
    {:ok, object(row, options)}
  catch
    {:skip, reason} -> {:skip, reason}
  end

  defp object(text, options) when is_binary(text), do: answered(text, options)

  defp object(row, options) do
    case fields(row, @fields) do
      %{"prompt" => prompt, "completion" => completion} = fields ->
        fields |> pair(prompt, completion) |> with_tools(fields) |> checked(options)

      %{"messages" => messages} = fields ->
        %{"messages" => messages(messages, "messages")}
        |> with_tools(fields)
        |> checked(options)

      %{"text" => text} ->
        answered(text, options)

      %{"prompt" => _prompt} ->
        skip("it has a prompt and no completion")

      %{"completion" => _completion} ->
        skip("it has a completion and no prompt")

      _other ->
        skip(@no_row)
    end
  end

  defp answered(text, options) do
    text = text |> text("text") |> String.trim()
    checked(%{"messages" => [user(options.prompt), assistant(text)]}, options)
  end

  # TRL's conversations in two halves, or two texts.
  defp pair(_fields, prompt, completion) do
    if messages?(prompt) and messages?(completion),
      do: %{"messages" => messages(prompt, "prompt") ++ messages(completion, "completion")},
      else: %{"messages" => [user(prompt!(prompt)), assistant(text(completion, "completion"))]}
  end

  defp prompt!(prompt) do
    prompt = text(prompt, "prompt")
    if String.trim(prompt) == "", do: skip("the prompt is empty"), else: prompt
  end

  defp user(text), do: %{"role" => "user", "content" => text}
  defp assistant(text), do: %{"role" => "assistant", "content" => text}

  defp with_tools(object, %{"tools" => tools}), do: Map.put(object, "tools", tools)
  defp with_tools(object, _fields), do: object

  defp messages?([first | _rest]), do: Map.has_key?(fields(first, ["role"]), "role")
  defp messages?(_other), do: false

  defp messages([_first | _rest] = messages, name) do
    if proper?(messages), do: Enum.map(messages, &message/1), else: skip("#{name} is no list")
  end

  defp messages([], name), do: skip("#{name} is empty")
  defp messages(_other, name), do: skip("#{name} is no list of messages")

  defp message(message) do
    known = if is_struct(message), do: @message_fields, else: :all

    case fields(message, known) do
      %{"role" => role} = fields -> with_content(%{fields | "role" => role(role)})
      _other -> skip("a message has no role")
    end
  end

  defp role(role) when is_atom(role), do: Atom.to_string(role)
  defp role(role), do: text(role, "role of a message")

  defp with_content(%{"content" => content} = message),
    do: %{message | "content" => text(content, "content of a message")}

  defp with_content(%{"tool_calls" => [_first | _rest]} = message),
    do: Map.put(message, "content", "")

  defp with_content(_message), do: skip("a message has no content")

  # What a row must have to be learned from: an answer at its end, long enough.
  defp checked(%{"messages" => messages} = object, options) do
    case List.last(messages) do
      %{"role" => "assistant", "tool_calls" => [_first | _rest]} ->
        object

      %{"role" => "assistant", "content" => answer} ->
        long!(String.trim(answer), options)
        object

      _other ->
        skip("its last message is not the assistant's")
    end
  end

  defp long!("", _options), do: skip("the answer is empty")

  defp long!(answer, options) do
    if String.length(answer) < options.min_length,
      do: skip("the answer is shorter than :min_length"),
      else: :ok
  end

  # A text, or a list of parts that are texts.
  defp text(text, name) when is_binary(text) do
    if String.valid?(text), do: text, else: skip("the #{name} is not valid UTF-8")
  end

  defp text([_first | _rest] = parts, name) do
    if proper?(parts),
      do: Enum.map_join(parts, &part(&1, name)),
      else: skip("the #{name} is no text")
  end

  defp text(nil, name), do: skip("the #{name} is nil")
  defp text(_other, name), do: skip("the #{name} is no text")

  defp part(text, name) when is_binary(text), do: text(text, name)

  defp part(part, name) do
    case fields(part, ["type", "text"]) do
      %{"text" => text} = fields when not is_map_key(fields, "type") -> text(text, name)
      %{"type" => type, "text" => text} when type in ["text", :text] -> text(text, name)
      %{"type" => _other} -> skip("the #{name} has a part that is no text")
      _other -> skip("the #{name} is no text")
    end
  end

  # Of a map, a struct, a keyword list or a list of pairs: what is not nil, by name.
  defp fields(row, known) do
    fields =
      for {key, value} <- pairs(row),
          value != nil,
          name = name(key),
          known == :all or name in known,
          do: {name, value}

    twice = fields -- Enum.uniq_by(fields, &elem(&1, 0))
    with [{name, _value} | _rest] <- twice, do: skip("it has #{name} twice")
    Map.new(fields)
  end

  defp pairs(struct) when is_struct(struct), do: struct |> Map.from_struct() |> Map.to_list()
  defp pairs(map) when is_map(map), do: Map.to_list(map)

  defp pairs([{_key, _value} | _rest] = pairs) do
    if proper?(pairs), do: Enum.filter(pairs, &match?({_key, _value}, &1)), else: []
  end

  defp pairs(_other), do: []

  defp name(key) when is_atom(key), do: Atom.to_string(key)
  defp name(key) when is_binary(key), do: key
  defp name(_key), do: nil

  defp proper?(list), do: List.improper?(list) == false

  @spec skip(String.t()) :: no_return()
  defp skip(reason), do: throw({:skip, reason})
end
